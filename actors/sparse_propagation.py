"""Blocks one after the other, all actors on each: block b + 1 sees what the experts of block b give.

An actor that is lost is replaced: its windows go through the finished blocks again, from disk, and what it had not handed over
is made again. Everybody else keeps what it has. A job that starts, or starts again, is the same: all seats are new.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import ray

from actors.crew import Lost
from actors.shards import Finished, Writing
from actors.stages import Stages
from actors.tournaments import play_all
from pipeline.routing import Tournament
from pipeline.schedule import Task, assign

CAPTURE, CLUSTER, SOLVE, WRITE = 0.1, 0.3, 0.5, 0.1  # shares of a block's time, for the bar


class _StartOver(Exception):
    """A finished block's shard cannot be written any more: go back to what is on disk."""


@dataclass
class _Block:
    """A block in the making, as far as the driver knows it. fitted: by router."""

    index: int
    tasks: list[list[Task]] = field(default_factory=list)  # by actor
    fitted: dict[int, dict] = field(default_factory=dict)
    solved: dict[Task, Finished] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def routers(self) -> list[dict]:
        return [self.fitted[router] for router in sorted(self.fitted)]


class SparsePropagation(Stages):
    """`known`: routers of the first block by what they depend on; jobs of a sweep see the same dense inputs there."""

    def expand(self, known: dict | None = None) -> None:
        """Make every missing layer, in order."""
        self.known = {} if known is None else known
        while missing := self.run.missing_layers():
            try:
                for index in missing:
                    self._expand(_Block(index), missing)
                self._finish()
            except _StartOver:
                self.writings = []
                for seat in self.crew.seats:
                    seat.block = -1

    def _expand(self, block: _Block, missing: list[int]) -> None:
        while True:
            try:
                self._bring_up_to(block)
                self.reader.ahead(min((index for index in missing if index > block.index), default=self.run.num_blocks))
                self._cluster(block)
                self._solve(block)
                self.record(most=len(self.crew.seats) - 1)
                self._propagate(block)
                return
            except Lost as lost:
                self._recover(lost, block)

    def _finish(self) -> None:
        try:
            self.record(most=0)
        except Lost as lost:
            self._recover(lost, _Block(self.source.num_blocks))

    def _recover(self, lost: Lost, block: _Block) -> None:
        self.crew.recover(lost, self.where)
        self.reader.forget()
        block.solved = {task: finished for task, finished in block.solved.items() if finished.solver in self.crew.seats}
        if len(block.tasks) != len(self.crew.seats):
            block.tasks = []  # dealt anew
        self._save_or_start_over()

    def _save_or_start_over(self) -> None:
        """Shards of finished blocks: they are there already, or somebody can still write them, or they are made again."""
        while self.writings:
            try:
                self.record(most=0)
            except Lost:
                try:
                    self.writings[0].begin(self.crew, self.driver, self.where)
                    self.record(most=len(self.writings) - 1)
                except Lost:
                    raise _StartOver from None

    # The stages

    def _bring_up_to(self, block: _Block) -> None:
        """Every actor's windows are this block's inputs, captured."""
        new = [seat for seat in self.crew.seats if seat.block < 0]
        if new:
            self.begin(list(zip(new, [self.shares()[seat.rank] for seat in new])))
        while behind := [seat for seat in self.crew.seats if seat.block < block.index]:
            index = min(seat.block for seat in behind)
            with self.stage("replay", index):
                self.reader.ahead(index + 1)
                shards = {True: None, False: None if all(seat.sees_run for seat in behind) else self.read_shard(index)}
                weights = self.reader.take(index)
                seats = [seat for seat in behind if seat.block == index]
                self.ask([(seat, seat.actor.replay.remote(self.run.storage, index, weights, shards[seat.sees_run])) for seat in seats])
                for seat in seats:
                    seat.block += 1
        waiting = [seat for seat in self.crew.seats if seat.block == block.index and not seat.captured]
        if waiting:
            with self._timed("capture", block):
                weights = self.reader.take(block.index)
                self.ask([(seat, seat.actor.capture.remote(block.index, weights)) for seat in waiting])
                for seat in waiting:
                    seat.captured, seat.settled = True, False
                self.reporter.advance(CAPTURE * len(waiting) / len(self.crew.seats))

    def _cluster(self, block: _Block) -> None:
        groups = range(len(self.architecture.router_groups))
        keys = {router: (str(self.job.routers()), router) for router in groups}
        if block.index == 0:
            block.fitted |= {router: self.known[keys[router]] for router in groups if keys[router] in self.known and router not in block.fitted}
        unfitted = [router for router in groups if router not in block.fitted]
        with self._timed("cluster", block):
            if unfitted:
                block.fitted |= dict(zip(unfitted, self._fit(block.index, unfitted)))
                self.reporter.advance(CLUSTER)
            if block.index == 0:
                self.known |= {keys[router]: block.fitted[router] for router in groups}
            self.everywhere = ray.put(block.routers)
            seats = [seat for seat in self.crew.seats if not seat.settled and seat.captured]
            self.ask([(seat, seat.actor.settle.remote(self.everywhere)) for seat in seats])
            for seat in seats:
                seat.settled = True

    def _fit(self, index: int, routers: Sequence[int]) -> list[dict]:
        """Fit routers on everybody's tokens. Each has an actor that decomposes and decides; KMeans runs are dealt to all."""
        seats, job, near = self.crew.seats, self.job, self.crew.near(self.crew.seats)
        deciders = {router: seats[(index + router) % len(seats)] for router in routers}
        sums = {router: [] for router in routers}
        axes, projected = dict.fromkeys(routers), {}
        if job.num_clusters == 1:
            return self.ask([(decider, decider.actor.route.remote(router, None, None)) for router, decider in deciders.items()])
        if not job.no_pca:
            sums = {router: [seat.actor.sums.remote(router) for seat in seats] for router in routers}
            parts = {router: [(seat, seat.actor.scatter.remote(router, seat is decider, near, *sums[router])) for seat in seats] for router, decider in deciders.items()}
            axes = {router: decider.actor.axes.remote(router, *[part for seat, part in parts[router] if seat is not decider]) for router, decider in deciders.items()}
        projected = {router: [seat.actor.project.remote(router, axes[router], near, *sums[router]) for seat in seats] for router in routers}
        tokens = self.windows.count * self.windows.length
        tournaments = {router: Tournament(tokens, job.num_clusters, job.kmeans_restarts, job.seed, self.crew.size.device_type) for router in routers}
        play_all(self.crew, self.where, tournaments, projected, {router: self.groups[router][1] for router in routers})
        return self.ask([(decider, decider.actor.route.remote(router, tournaments[router].winner, axes[router], *sums[router]))
                         for router, decider in deciders.items()])

    def _solve(self, block: _Block) -> None:
        seats = self.crew.seats
        if not block.tasks:
            block.tasks = assign([fit["counts"] for fit in block.routers], self.groups, len(seats))
        waiting = [(seat, task) for seat, tasks in zip(seats, block.tasks) for task in tasks if task not in block.solved]
        with self._timed("solve", block):
            # An actor does what it is asked in the order of asking: everybody's tokens are asked for before anybody computes with them.
            elsewhere = [[other.actor.tokens_of.remote(task, self.crew.near([seat, other])) for other in seats if other is not seat] for seat, task in waiting]
            calls = [(seat, seat.actor.solve.remote(block.index, task, *tokens)) for (seat, task), tokens in zip(waiting, elsewhere)]
            of = {ref: (seat, task) for (seat, ref), (_, task) in zip(calls, waiting)}
            share = SOLVE / max(1, sum(len(task.experts) for tasks in block.tasks for task in tasks))

            def note(ref: ray.ObjectRef, told: tuple[list[dict], dict]) -> None:
                seat, task = of[ref]
                block.solved[task] = Finished(seat, *told)
                self.reporter.advance(share * len(task.experts))

            self.ask(calls, note, watch=self.experts_solved(block.index))

    def _propagate(self, block: _Block) -> None:
        seats, made, solved = self.crew.seats, (0, block.index), block.solved
        near, alone = self.crew.near(seats), len(seats) == 1
        with self._timed("propagate", block):
            # Only what another actor solved moves; on one actor nothing does.
            experts = {task: None if alone else finished.solver.actor.experts.remote(made, task, near) for task, finished in solved.items()}
            here = [seat for seat in seats if seat.block == block.index]
            self.ask([(seat, seat.actor.propagate.remote(block.index, list(solved), near, *[experts[task] for task, finished in solved.items() if finished.solver is not seat]))
                      for seat in here])
            for seat in here:
                seat.block, seat.captured = seat.block + 1, False
        if not near:  # lent GPU memory ends with its lender; what went through the object store, packed, is there without it
            for task, finished in solved.items():
                finished.experts = experts[task]
        self.write(Writing(self.run, made, self.architecture.router_groups, block.routers, solved, block.seconds))

    def _timed(self, name: str, block: _Block) -> AbstractContextManager[None]:
        self.record()
        return self.stage(name, block.index, block.seconds)
