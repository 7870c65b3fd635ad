"""Every block sees what the dense model gives: blocks do not wait for each other, and each actor makes its own alone.

First the windows flow through the dense blocks, group by group, from actor to actor; each keeps the states that enter the
first of its blocks. Then nobody waits for anybody. An actor that is lost is replaced, and sends its windows through the dense
blocks before its own by itself.
"""

from dataclasses import dataclass, field

import ray

from actors.crew import Lost, Seat
from actors.layer_shard import Share
from actors.shards import Finished, Writing
from actors.stages import Stages
from pipeline.checkpoint import RunDirectory
from pipeline.config import Job
from pipeline.schedule import deal

UNWRITTEN = 1  # finished blocks that may wait for the disk on an actor while it goes on


@dataclass
class _Stretch:
    """The blocks of one actor. left: still to be made. at: the block that its windows enter next. busy: with the first of `left`.
    writing: made, and on their way to disk."""

    seat: Seat
    left: list[int]
    at: int = 0
    busy: bool = False
    writing: list[Writing] = field(default_factory=list)


class DensePropagation(Stages):
    """For several jobs of the same model and windows at once."""

    def expand(self, jobs: list[tuple[Job, RunDirectory]]) -> None:
        """Make every missing layer of every job; each has a directory of its own."""
        self.jobs = jobs
        while missing := sorted({index for _, run in jobs for index in run.missing_layers()}):
            try:
                stretches = self._flow(missing)
            except Lost as lost:
                self._recover(lost)
                continue
            with self.clock.timed("expand"):
                self._work(stretches)

    def _recover(self, lost: Lost) -> None:
        self.crew.recover(lost, self.where)
        self.reader.forget()

    def _flow(self, missing: list[int]) -> list[_Stretch]:
        """Every actor's windows are the inputs of its first block."""
        stretches = [_Stretch(seat, list(blocks)) for seat, blocks in zip(self.crew.seats, deal(missing, len(self.crew.seats))) if blocks]
        groups = self.windows.groups(self.crew.size.device_type)
        self._begin([stretch.seat for stretch in stretches])
        self.where = "dense pass"
        self.reporter.stage("dense pass", f"{self.source.num_blocks} layers")
        firsts = [stretch.left[0] for stretch in stretches]
        # The first actor starts from the embedding, the last one hands nothing on.
        ranges = [range(start, stop) for start, stop in zip([0, *firsts[1:]], [*firsts[1:], firsts[-1]])]
        loading = [(stretch.seat, stretch.seat.actor.load.remote(list(blocks), *self._weights(stretch.seat, blocks))) for stretch, blocks in zip(stretches, ranges)]
        passing = []
        for number in range(len(groups)):
            entering = None
            for stretch in stretches:
                entering, done = stretch.seat.actor.pass_on.remote(number, stretch.left[0], entering)
                passing.append((stretch.seat, done))
        with self.clock.timed("dense pass"):
            self.ask(loading + passing)
        for stretch in stretches:
            stretch.at = stretch.left[0]
        return stretches

    def _begin(self, seats: list[Seat]) -> None:
        groups = self.windows.groups(self.crew.size.device_type)
        share = Share(dict(enumerate(groups)), [ids_WL.numel() for ids_WL in groups], alone=True)
        self.begin([(seat, share) for seat in seats])

    def _weights(self, seat: Seat, blocks) -> list[ray.ObjectRef]:
        """Of dense blocks, for an actor that does not see the model's files."""
        return [] if seat.sees_model else [self.reader.take(index) for index in blocks]

    def _work(self, stretches: list[_Stretch]) -> None:
        waiting: dict[ray.ObjectRef, Seat] = {}
        while any(stretch.left or stretch.writing for stretch in stretches):
            try:
                if new := [stretch.seat for stretch in stretches if stretch.seat.block < 0]:
                    self._begin(new)
                self._look(stretches, waiting)
                if not waiting:  # all that is left waits for the disk
                    for stretch in stretches:
                        self._note_written(stretch, wait=True)
                for seat, _, result in self.crew.as_ended(waiting, self.where, lambda: self._look(stretches, waiting)):
                    self._made(next(stretch for stretch in stretches if stretch.seat is seat), result)
                    self._look(stretches, waiting)
            except Lost as lost:
                self._recover(lost)
                if not any(stretch.seat in self.crew.seats for stretch in stretches):
                    return  # a new crew: what is missing is dealt to it
                self._take_over(stretches, waiting)

    def _go_on(self, stretch: _Stretch, waiting: dict[ray.ObjectRef, Seat]) -> None:
        """Let an actor begin its next block, unless the disk is too far behind."""
        if stretch.busy or not stretch.left or len(stretch.writing) > UNWRITTEN:
            return
        index = stretch.left[0]
        between = list(range(stretch.at, index))
        jobs = [job for job, _ in self.jobs]
        more = len(stretch.left) > 1
        ref = stretch.seat.actor.expand_alone.remote(index, jobs, between, more, *self._weights(stretch.seat, [*between, index]))
        waiting[ref] = stretch.seat
        stretch.busy = True
        self.where = f"expand {self.layer(index)}"
        self.reporter.stage("expand", self.layer(index))

    def _made(self, stretch: _Stretch, results: list[dict]) -> None:
        """A block is made: its shards, one for each job, go to disk."""
        index = stretch.left.pop(0)
        stretch.at, stretch.busy = index + 1, False
        for number, ((_, run), result) in enumerate(zip(self.jobs, results)):
            made = (number, index)
            if index not in run.missing_layers():
                stretch.seat.actor.forget.remote(made)
                continue
            tasks = {task: Finished(stretch.seat, reports, entries) for task, (reports, entries) in result["tasks"].items()}
            writing = Writing(run, made, self.architecture.router_groups, result["fitted"], tasks, result["seconds"])
            writing.begin(self.crew, self.driver, self.where)
            stretch.writing.append(writing)
        self.reporter.advance(0.9)

    def _look(self, stretches: list[_Stretch], waiting: dict[ray.ObjectRef, Seat]) -> None:
        for stretch in stretches:
            self._note_written(stretch, wait=False)
            self._go_on(stretch, waiting)

    def _note_written(self, stretch: _Stretch, wait: bool) -> None:
        while stretch.writing and (wait or stretch.writing[0].is_done()):
            self.note_written(stretch.writing[0])
            stretch.seat.actor.forget.remote(stretch.writing.pop(0).made)

    def _take_over(self, stretches: list[_Stretch], waiting: dict[ray.ObjectRef, Seat]) -> None:
        """New actors in the seats of those that were lost: they make what is not on disk."""
        for stretch in stretches:
            seat = self.crew.seats[stretch.seat.rank]
            if seat is stretch.seat:
                continue
            for ref in [ref for ref, old in waiting.items() if old is stretch.seat]:
                del waiting[ref]
            unwritten = sorted({writing.index for writing in stretch.writing})
            stretch.seat, stretch.left, stretch.at, stretch.busy, stretch.writing = seat, unwritten + stretch.left, 0, False, []
