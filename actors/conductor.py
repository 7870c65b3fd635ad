"""The driver's part of a job: a crew of actors, and what it does stage by stage. What is left on disk decides what runs next."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from actors.cluster import CrewSize
from actors.crew import START, Crew, Lost
from actors.dense_propagation import DensePropagation
from actors.evaluation import Evaluation
from actors.metrics import usage
from actors.profile import actor_spans
from actors.progress import Reporter
from actors.sparse_propagation import SparsePropagation
from actors.stages import look
from pipeline.architectures import Architecture
from pipeline.assembly import Assembly, assemble
from pipeline.checkpoint import RunDirectory
from pipeline.config import Job
from pipeline.errors import UserError
from pipeline.perplexity import Perplexity
from pipeline.preflight import Source, router_shapes
from pipeline.storage import Storage
from pipeline.timeline import Clock, write_profile
from pipeline.windows import Windows


class Conductor:
    """Runs jobs over a crew of actors. `clock` has the seconds by stage. stall_limit: `Crew.limit`."""

    def __init__(self, size: CrewSize, dtype: str, reporter: Reporter, verbose: bool = False, stall_limit: float = 1800):
        self.dtype, self.reporter = dtype, reporter
        self.clock = Clock()
        self.crew = Crew(size, dtype, reporter, verbose, stall_limit)
        self.driver = ThreadPoolExecutor(1, "driver's files")  # reads and writes for actors that do not see the files
        self.usage: dict = {}  # of the last expansion
        self.known: dict = {}  # routers of the first block: jobs that follow may use them

    @property
    def devices(self) -> list[str]:
        return self.crew.devices

    def start(self) -> None:
        """A crew that answers."""
        with self.clock.timed("start"):
            try:
                self.crew.start()
            except Lost as lost:
                self.crew.recover(lost, START)

    def stop(self) -> None:
        """The end of the job."""
        self.crew.stop()
        self.driver.shutdown(wait=False, cancel_futures=True)

    def profile(self, directory: Path) -> str:
        """Write where the time went; returns the table of stages."""
        return write_profile(directory, self.clock.spans + actor_spans(self.crew.workers, self.clock.spans))

    def sample(self, source: Source, count: int, length: int, seed: int) -> Tensor:
        with self.clock.timed("sample"):
            self.reporter.stage("sample windows", f"{count} of {length} tokens")
            while True:
                try:
                    return self._sample(source, count, length, seed)
                except Lost as lost:
                    self.crew.recover(lost, "sample windows")

    def _sample(self, source: Source, count: int, length: int, seed: int) -> Tensor:
        look(self.crew, self.crew.seats, None, source.directory, source.fingerprint)
        able = next((seat for seat in self.crew.seats if seat.sees_model), None)
        if able is None:
            raise UserError(f"--dataset self samples from the whole model, but no actor's machine has --model {source.name} at {source.directory}; "
                            "give a hub id, put it on every machine, or give text.")
        return self.crew.ask([(able, able.actor.sample.remote(source.directory, count, length, seed))], "sample windows")[0]

    def expand(self, jobs: list[tuple[Job, RunDirectory]], source: Source, architecture: Architecture, windows: Windows) -> None:
        """Make every missing layer. Several jobs at a time go with --propagation dense alone."""
        job, run = jobs[0]
        if not any(directory.missing_layers() for _, directory in jobs):
            return
        for seat in self.crew.seats:
            seat.block = -1  # its windows may be an earlier job's
        way = DensePropagation if job.propagation == "dense" else SparsePropagation
        stages = way(job, source, architecture, router_shapes(source, architecture), windows, run, self.crew, self.reporter, self.clock, self.driver)
        before, start = self.crew.counts(), time.monotonic()
        try:
            if job.propagation == "dense":
                stages.expand(jobs)
            else:
                stages.expand(self.known)
        finally:
            for _, directory in jobs:
                directory.storage.remove_leftovers()
        self.usage = usage(before, self.crew.counts(), time.monotonic() - start)

    def assemble(self, job: Job, source: Source, architecture: Architecture, storage: Storage, target: Path) -> dict[str, str]:
        """Make the saved model from all layers, on the driver's machine; returns its files' hashes."""
        assembly = Assembly(source.directory, storage, job, architecture.router_groups, architecture.blocks, self.dtype,
                            {"dense_model": source.described(), **job.recipe()})
        with self.clock.timed("assemble"):
            return assemble(assembly, target, lambda index: self.reporter.stage("assemble", f"layer {index + 1} of {source.num_blocks}"))

    def evaluate(self, what: str, directory: Path, windows: Windows, num_blocks: int, run: RunDirectory | None = None) -> Perplexity:
        with self.clock.timed(f"evaluate {what}"):
            losses = Evaluation(what, directory, num_blocks, windows, run, self.crew, self.reporter, self.driver).losses()
        return Perplexity.of(losses, windows.source, windows.length, self.dtype)
