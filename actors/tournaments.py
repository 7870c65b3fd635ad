"""The KMeans runs of all routers, on all actors: whoever is free makes the next one.

Runs of one round differ in length by a factor of two, so they are not dealt beforehand. The widest router goes first: the
others fill the gaps that its rounds leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import ray

from actors.crew import Crew
from pipeline.routing import Entry, Run, Tournament


@dataclass
class _Round:
    """waiting: entries that nobody has begun, by their place in the round. runs: made, by place."""

    tournament: Tournament
    waiting: dict[int, Entry] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)

    def begin(self) -> None:
        self.waiting, self.runs = dict(enumerate(self.tournament.entries)), {}

    def end(self, made: dict[int, Run]) -> None:
        self.runs |= made
        if len(self.runs) == len(self.tournament.entries):
            self.tournament.advance([self.runs[place] for place in sorted(self.runs)])
            self.begin()


def play_all(crew: Crew, where: str, tournaments: dict[int, Tournament], projected: dict[int, Sequence[ray.ObjectRef]], widths: dict[int, int]) -> None:
    """Play every router's tournament to its end. projected: by router everybody's tokens, by rank. widths: what makes its runs long."""
    rounds = {router: _Round(tournaments[router]) for router in sorted(tournaments, key=lambda router: -widths[router])}
    for one in rounds.values():
        one.begin()
    free, waiting, calls = list(crew.seats), {}, {}

    def hand_out() -> None:
        while free and (router := next((router for router, one in rounds.items() if one.waiting), None)) is not None:
            seat, one = free.pop(0), rounds[router]
            # An actor makes as many at once as it has threads, unless others would then have nothing to do.
            most = min(crew.size.runs_at_once, -(-len(one.waiting) // (1 + len(free))))
            places = list(one.waiting)[:most]
            entries = [one.waiting.pop(place) for place in places]
            elsewhere = [ref for other, ref in zip(crew.seats, projected[router]) if other is not seat]
            call = seat.actor.play.remote(router, one.tournament, entries, *elsewhere)
            waiting[call], calls[call] = seat, (router, places)

    hand_out()
    for seat, call, runs in crew.as_ended(waiting, where):
        router, places = calls.pop(call)
        rounds[router].end(dict(zip(places, runs)))
        free.append(seat)
        hand_out()
