"""What both ways through the blocks have in common: stages with their seconds, handing over windows, writing shards."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray

from actors.cluster import host_bytes
from actors.crew import START, Call, Crew, Seat
from actors.layer_shard import Share
from actors.model_reader import ModelReader
from actors.progress import Reporter
from actors.shards import Writing
from actors.wire import pack_all
from pipeline.architectures import Architecture
from pipeline.checkpoint import RunDirectory
from pipeline.config import Job
from pipeline.preflight import Source
from pipeline.schedule import deal
from pipeline.timeline import Clock
from pipeline.windows import Windows


@dataclass
class Stages:
    """`groups`: for each router the rows of its linears together, and their columns. driver: a thread for the driver's own files."""

    job: Job
    source: Source
    architecture: Architecture
    groups: tuple[tuple[int, int], ...]
    windows: Windows
    run: RunDirectory
    crew: Crew
    reporter: Reporter
    clock: Clock
    driver: ThreadPoolExecutor

    def __post_init__(self):
        self.reader = ModelReader(self.crew, self.source.directory, self.source.num_blocks, self.driver)
        self.writings: list[Writing] = []  # blocks on their way to disk, in order
        self.where = START

    def layer(self, index: int) -> str:
        return f"layer {index + 1} of {self.source.num_blocks}"

    @contextlib.contextmanager
    def stage(self, name: str, index: int, *more: dict[str, float]) -> Iterator[None]:
        self.where = f"{name} {self.layer(index)}"
        self.reporter.stage(name, self.layer(index))
        with self.clock.timed(name, self.layer(index), *more):
            yield

    def ask(self, calls: Sequence[Call], done: Callable = lambda ref, result: None, watch: Callable = lambda: None) -> list:
        return self.crew.ask(calls, self.where, done, watch)

    def experts_solved(self, index: int) -> Callable[[], None]:
        """Shows how many of a block's experts are solved, whenever it is called."""
        linears = sum(len(group) for group in self.architecture.router_groups)
        all_of_them, before = self.job.num_clusters * linears, sum(counts.solves for counts in self.crew.counts())

        def show() -> None:
            solved = sum(counts.solves for counts in self.crew.counts()) - before
            self.reporter.detail(f"{self.layer(index)}, {max(0, min(solved, all_of_them))} of {all_of_them} experts")
        return show

    # Windows

    def shares(self) -> list[Share]:
        """Each actor's consecutive window groups."""
        groups = self.windows.groups(self.crew.size.device_type)
        tokens = [ids_WL.numel() for ids_WL in groups]
        actors = len(self.crew.seats)
        return [Share(dict(share), tokens, actors == 1) for share in deal(list(enumerate(groups)), actors)]

    def begin(self, shares: Sequence[tuple[Seat, Share]]) -> None:
        """Hand calibration windows over to new actors."""
        self.where = START
        look(self.crew, [seat for seat, _ in shares], self.run, self.source.directory, self.source.fingerprint)
        with self.clock.timed("start"):
            self.ask([(seat, seat.actor.warm_up.remote(self.job)) for seat, _ in shares])
        with self.clock.timed("embed"):
            self.where = "embed"
            self.ask([(seat, seat.actor.begin.remote(self.job, self.reader.files_for(seat), self.architecture, share, self._host_bytes(seat),
                                                     self.run.path if seat.sees_run else None)) for seat, share in shares])
        for seat, _ in shares:
            seat.block, seat.captured, seat.settled = 0, False, False

    def _host_bytes(self, seat: Seat) -> float:
        return host_bytes(seat.place.node, sum(other.place.node == seat.place.node for other in self.crew.seats))

    # Shards

    def read_shard(self, index: int) -> ray.ObjectRef:
        """A finished shard, for actors that do not see the run directory."""
        return ray.put(pack_all(self.run.storage.read(index)))

    def write(self, writing: Writing) -> None:
        """Begin to write a block's shard."""
        self.writings.append(writing)
        writing.begin(self.crew, self.driver, self.where)

    def record(self, most: int | None = None) -> None:
        """Note in the manifest which shards are written, which goes on beside the blocks that follow. most: wait until no more
        than so many are on their way; None: only look."""
        while self.writings and (self.writings[0].is_done() if most is None else len(self.writings) > most):
            writing = self.writings[0]
            self.note_written(writing)
            self.writings.pop(0)
            for seat in self.crew.seats:
                seat.actor.forget.remote(writing.made)

    def note_written(self, writing: Writing) -> None:
        with self.stage("write", writing.index, writing.seconds):
            digest = writing.digest(self.crew, self.where)
        for stage, seconds in writing.seconds.items():
            writing.run.add_seconds(stage, seconds)
        writing.run.record_layer(writing.index, digest, writing.seconds, writing.reports)
        self.reporter.advance(0.1)


def look(crew: Crew, seats: Sequence[Seat], run: RunDirectory | None, directory: Path, fingerprint: str) -> None:
    """Which of these actors see the run directory (if there is one), and the model's files?"""
    mark, token = (run.mark, run.token) if run else (None, "")
    seen = crew.ask([(seat, seat.actor.sees.remote(mark, token, directory, fingerprint)) for seat in seats], START)
    for seat, found in zip(seats, seen):
        seat.sees_run, seat.sees_model = found
