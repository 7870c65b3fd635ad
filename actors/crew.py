"""The actors of a job: started, asked, watched, replaced, stopped.

An actor may die (killed, out of memory, its node gone) or hang. Whoever asks then gets `Lost`, which says whose work is to be
done again; what an actor says went wrong in its work is the user's to put right, and ends the job with a sentence.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.cluster import CrewSize, capacity, stop_actors
from actors.layer_shard import LayerShard, Place
from actors.metrics import Counts
from actors.progress import Reporter
from actors.secrets import secrets_here
from pipeline.errors import UserError, for_the_user
from pipeline.loans import LoanError

PATIENCE = 0.5  # seconds between two looks
START_SECONDS = 600  # that processes, imports and the first use of a GPU may take
ANSWER_SECONDS = 20  # in which an actor that computes still says so
START = "start"
LOSSES_AT_A_PLACE = 3  # before the job stops


class Lost(Exception):
    """Actors are gone, by rank; or what they had handed over is (no ranks)."""

    def __init__(self, ranks: set[int], reason: str):
        super().__init__(reason)
        self.ranks = ranks


@dataclass(eq=False)
class Seat:
    """One place in the crew; its actor may be replaced.

    borrows: from the GPUs of all others on its machine. block: which block's inputs its windows are (-1: not handed over yet).
    captured, settled: how far this actor is with that block.
    """

    rank: int
    actor: Any = None
    place: Place | None = None
    sees_run: bool = True
    sees_model: bool = True
    borrows: bool = False
    block: int = -1
    captured: bool = False
    settled: bool = False

    def __str__(self) -> str:
        return f"actor {self.rank}" + (f" on {self.place.host} ({self.place.device}, process {self.place.process})" if self.place else "")


Call = tuple[Seat, ray.ObjectRef]


@dataclass
class Crew:
    """`limit`: seconds after which a call that has not ended counts as hung."""

    size: CrewSize
    dtype: str
    reporter: Reporter
    verbose: bool = False
    limit: float = 1800
    seats: list[Seat] = field(default_factory=list)
    workers: dict[str, int] = field(default_factory=dict)  # rank by Ray's name of the process, of all there ever were
    losses: dict[str, int] = field(default_factory=dict)  # by place

    @property
    def devices(self) -> list[str]:
        return [seat.place.device for seat in self.seats]

    # Starting and stopping

    def start(self) -> None:
        """All seats anew."""
        self.stop()
        self.seats = [Seat(rank) for rank in range(self.size.actors)]
        self._fill()

    def replace(self, ranks: set[int]) -> None:
        """New actors in some seats; nothing is left of what the old ones held."""
        for rank in ranks:
            stop_actors([self.seats[rank].actor])
            self.seats[rank] = Seat(rank)
        self._fill()

    def _fill(self) -> None:
        secrets = secrets_here()
        for seat in self.seats:
            if seat.actor is None:
                options = dict(num_cpus=self.size.cpus, num_gpus=self.size.gpus, max_restarts=0)
                seat.actor = LayerShard.options(**options).remote(seat.rank, self.size.threads, self.dtype, self.verbose, self.size.gpus)
                if secrets:
                    seat.actor.environ.remote(secrets)
        new = [seat for seat in self.seats if seat.place is None]
        places = self.ask([(seat, seat.actor.where.remote()) for seat in new], START, watch=self._check_room)
        for seat, place in zip(new, places):
            seat.place = place
            self.workers[place.worker] = seat.rank
        self._find_lenders()

    def _find_lenders(self) -> None:
        if not self.size.gpus or len(self.seats) < 2:
            return
        offers = self.ask([(seat, seat.actor.offer.remote()) for seat in self.seats], START)
        by_node = {seat.place.node: [] for seat in self.seats}
        for seat, offer in zip(self.seats, offers):
            by_node[seat.place.node].append(offer)
        found = self.ask([(seat, seat.actor.borrows.remote([other for other in by_node[seat.place.node] if other != offer])) for seat, offer in zip(self.seats, offers)], START)
        for seat, offer, can in zip(self.seats, offers, found):
            seat.borrows = can and offer is not None

    @staticmethod
    def near(seats: Sequence[Seat]) -> bool:
        """Can these actors borrow from each other's GPUs?"""
        return all(seat.borrows and seat.place.node == seats[0].place.node for seat in seats)

    def _check_room(self) -> None:
        """A node that is gone takes a while to be known as such; an actor meant for it would wait for ever."""
        if capacity(self.size) < len(self.seats):
            raise Lost(set(), "a node is gone")

    def recover(self, lost: Lost, where: str) -> None:
        """After a loss: new actors in the seats of those that are gone; or a new crew, if all are gone or Ray has no room for
        as many. Raises UserError if this goes on and on at one place."""
        while True:
            self.losses[where] = self.losses.get(where, 0) + 1
            if self.losses[where] >= LOSSES_AT_A_PLACE:
                raise UserError(f"Actors were lost {self.losses[where]} times at the same place ({where}; the last: {_line(lost)}); "
                                "what is finished stays, and the same command goes on.") from None
            try:
                self._recover(lost)
                return
            except Lost as another:
                lost = another

    def _recover(self, lost: Lost) -> None:
        names = ", ".join(str(self.seats[rank]) for rank in sorted(lost.ranks)) or "What actors had handed over"
        room = capacity(self.size)
        if lost.ranks and len(lost.ranks) < len(self.seats) and room >= len(self.seats):
            self.reporter.note(f"{_capital(names)} was lost ({_line(lost)}); a new one takes over its share.")
            self.replace(lost.ranks)
            return
        actors = max(1, min(self.size.actors, room))
        fewer = f" {actors} of {self.size.actors}, since Ray has room for no more," if actors < self.size.actors else ""
        self.reporter.note(f"{_capital(names)} was lost ({_line(lost)}); the crew starts anew,{fewer} and goes on from what is on disk.")
        self.size = self.size.of(actors)
        self.start()

    def stop(self) -> None:
        """The end of the job."""
        stop_actors([seat.actor for seat in self.seats if seat.actor is not None])

    # Asking

    def everyone(self, method: str, *args) -> list[Call]:
        return [(seat, getattr(seat.actor, method).remote(*args)) for seat in self.seats]

    def ask(self, calls: Sequence[Call], where: str, done: Callable[[ray.ObjectRef, Any], object] = lambda ref, result: None,
            watch: Callable[[], object] = lambda: None) -> list:
        """The results of calls, in their order; they come to the driver, so they should be small. where: for people. done: is
        told of each call that has ended. watch: is called now and then. Raises Lost, or UserError for what the user can put right."""
        results = {}
        for _, ref, result in self.as_ended({ref: seat for seat, ref in calls}, where, watch):
            results[ref] = result
            done(ref, result)
        return [results[ref] for _, ref in calls]

    def as_ended(self, waiting: dict[ray.ObjectRef, Seat], where: str, watch: Callable[[], object] = lambda: None) -> Iterator[tuple[Seat, ray.ObjectRef, Any]]:
        """Calls as they end, with their results. More may be put into `waiting` meanwhile."""
        quiet_since, limit = time.monotonic(), max(self.limit, START_SECONDS) if where == START else self.limit
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=PATIENCE)
            for ref in ended:
                result = self.take(ref, where)
                quiet_since = time.monotonic()
                yield waiting.pop(ref), ref, result
            if not ended:
                watch()
            if time.monotonic() - quiet_since > limit:
                self._find_hung(where, limit)
                quiet_since = time.monotonic()

    def take(self, ref: ray.ObjectRef, where: str) -> Any:
        """One result that is there."""
        try:
            return ray.get(ref)
        except RayError as error:
            raise self.translated(error, where) from None

    def translated(self, error: Exception, where: str) -> Exception:
        """What a call raised, as Lost, as a sentence for the user, or as it is."""
        cause = error
        while isinstance(cause, RayTaskError) and cause.cause is not None and cause.cause is not cause:
            cause = cause.cause
        if isinstance(cause, (RayActorError, ObjectLostError, LoanError)) or isinstance(error, (RayActorError, ObjectLostError)):
            return Lost(self._gone(), str(cause))
        return for_the_user(cause, where) or error

    def _gone(self) -> set[int]:
        """Ranks of seats whose actors are dead."""
        asked = [(seat, seat.actor.pulse.remote()) for seat in self.seats]
        return {seat.rank for seat, ref in asked if self._answer(ref) == "dead"}

    def _answer(self, ref: ray.ObjectRef) -> Counts | str:
        try:
            return ray.get(ref, timeout=ANSWER_SECONDS)
        except GetTimeoutError:
            return "silent"
        except RayError:
            return "dead"

    def _find_hung(self, where: str, limit: float) -> None:
        """Nothing has ended for `limit` seconds. Raises Lost for actors that are stuck; returns if all are waiting their turn."""
        stuck: dict[int, str] = {}
        asked = [(seat, seat.actor.pulse.remote()) for seat in self.seats]
        for seat, ref in asked:
            answer = self._answer(ref)
            if isinstance(answer, str):
                stuck[seat.rank] = f"{seat} has not answered for {ANSWER_SECONDS} s" if answer == "silent" else f"{seat} is dead"
            else:
                for call, since in answer.doing.items():
                    if time.time() - since > limit:
                        stuck[seat.rank] = f"{seat} has been in {call} for {time.time() - since:.0f} s"
        if stuck:
            raise Lost(set(stuck), f"{'; '.join(stuck.values())}; --stall-limit is {self.limit:g} s; at {where}")

    def counts(self) -> list[Counts]:
        """What every actor has counted; nothing of those that do not answer."""
        with contextlib.suppress(RayError):
            return ray.get([seat.actor.pulse.remote() for seat in self.seats], timeout=ANSWER_SECONDS)
        return []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
