"""The driver's loop: what is left on disk decides what runs next.

An actor that dies takes its activations with it; the crew is made anew and replays the finished blocks from disk, just as
a restarted driver does. There is one way to go on, whatever was killed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayActorError
from torch import Tensor

from actors.cluster import Crew, deal, stop_actors
from actors.layer_shard import LayerShard, Task
from actors.profile import actor_spans
from actors.progress import EVALUATION_COST, Reporter
from pipeline.architectures import Architecture
from pipeline.assembly import Assembly
from pipeline.checkpoint import RunDirectory
from pipeline.config import Job
from pipeline.errors import UserError
from pipeline.files import remove_leftovers
from pipeline.perplexity import Perplexity
from pipeline.timeline import DRIVER, Span, write_profile
from pipeline.windows import Windows

LOSSES_WITHOUT_PROGRESS = 3  # crews lost in a row before the job stops


@dataclass
class _Unrecorded:
    """A block whose shard is being written. `written`: its hash, once it is there."""

    index: int
    written: ray.ObjectRef
    seconds: dict[str, float]
    reports: list[dict]


@dataclass
class Conductor:
    """Runs a job's stages over a crew of actors. `seconds` adds up by stage."""

    crew: Crew
    dtype: str
    reporter: Reporter
    verbose: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    kept: list | None = None  # actors of an earlier job to go on with, and where a later one finds them; None: they end with the job
    spans: list[Span] = field(default_factory=list)  # the stages, as they went by

    def __post_init__(self):
        self.actors: list = []
        self.unrecorded: _Unrecorded | None = None
        self.workers: dict[str, int] = {}

    # The crew

    def start(self) -> None:
        """A crew that answers: the kept one, or a new one."""
        self.actors = []
        self.restarting(lambda: None)

    def _start(self) -> None:
        with self._timed("start"):
            self.actors = list(self.kept or self._new_actors())
            places = ray.get([actor.where.remote() for actor in self.actors])
            self.devices = [place.device for place in places]
            self.workers |= {place.worker: rank for rank, place in enumerate(places)}

    def _new_actors(self) -> list:
        options = dict(num_cpus=self.crew.cpus, num_gpus=self.crew.gpus, max_restarts=0)
        actors = [LayerShard.options(**options).remote(rank, self.crew.threads, self.dtype, self.verbose) for rank in range(self.crew.actors)]
        if self.kept is not None:
            self.kept[:] = actors
        return actors

    def stop(self) -> None:
        """The end of the job."""
        if self.kept is None:
            stop_actors(self.actors)

    def restarting(self, work: Callable[[], object], progress: Callable[[], object] = lambda: None):
        """Do `work`; if an actor dies, there or while it starts, make the crew anew and do it again. Gives up when several
        crews in a row die without `progress()` changing."""
        lost, before = 0, progress()
        while True:
            try:
                if not self.actors:
                    self._start()
                return work()
            except RayActorError as error:
                now = progress()
                lost = 1 if now != before else lost + 1
                before = now
                if lost >= LOSSES_WITHOUT_PROGRESS:
                    raise UserError(f"{lost} crews of actors died one after the other at the same place (the last: {' '.join(str(error).split())[:300]}); "
                                    "what is finished stays, and the same command goes on.") from None
                self.reporter.note(f"An actor died; starting {self.crew.actors} anew and going on from what is on disk.")
                stop_actors(self.actors)
                if self.kept is not None:
                    self.kept.clear()

    @contextlib.contextmanager
    def _timed(self, stage: str, layer: str = "", *more: dict[str, float]) -> Iterator[None]:
        """Adds the seconds up by stage, in `seconds` and in `more`."""
        start = time.time()
        try:
            yield
        finally:
            span = Span(DRIVER, stage, layer, start, time.time() - start)
            self.spans.append(span)
            for seconds in (self.seconds, *more):
                seconds[stage] = seconds.get(stage, 0.0) + span.seconds

    def profile(self, directory: Path) -> str:
        """Write where the time went; returns the table of stages."""
        return write_profile(directory, self.spans + actor_spans(self.workers, self.spans))

    def sample(self, directory: Path, count: int, length: int, seed: int) -> Tensor:
        with self._timed("sample"):
            self.reporter.stage("sample windows", f"{count} of {length} tokens")
            return self.restarting(lambda: ray.get(self.actors[0].sample.remote(directory, count, length, seed)))

    # Expansion

    def expand(self, job: Job, directory: Path, architecture: Architecture, windows: Windows, run: RunDirectory) -> None:
        """Make every missing layer, in order."""
        self.restarting(lambda: self._expand_missing(job, directory, architecture, windows, run),
                        lambda: len(run.missing_layers()))

    def _expand_missing(self, job: Job, directory: Path, architecture: Architecture, windows: Windows, run: RunDirectory) -> None:
        with contextlib.suppress(RayActorError):
            self._record(run, wait=False)  # what a crew that has died had finished
        self.unrecorded = None
        remove_leftovers(run.path / "layers")
        missing = run.missing_layers()
        if not missing:
            return
        with self._timed("start"):
            ray.get([actor.warm_up.remote(job) for actor in self.actors])
        shares = self._shares(windows)
        starts = [sum(ids_WL.numel() for share in shares[:rank] for _, ids_WL in share) for rank in range(len(shares))]
        with self._timed("embed"):
            ray.get([actor.begin.remote(job, directory, run.path, architecture, dict(share), start) for actor, share, start in zip(self.actors, shares, starts)])
        owners = [actor for actor, blocks in zip(self.actors, deal(list(range(run.num_blocks)), len(self.actors))) for _ in blocks]
        following = owners[0].publish.remote(0)
        for index in range(missing[-1] + 1):
            # The next block's weights are read while this one is computed.
            weights, following = following, owners[index + 1].publish.remote(index + 1) if index < missing[-1] else None
            if index in missing:
                self._expand_block(index, weights, owners[index], job, architecture, run)
            else:
                layer = f"layer {index + 1} of {run.num_blocks}"
                with self._timed("replay", layer):
                    self.reporter.stage("replay", layer)
                    ray.get([actor.replay.remote(index, weights) for actor in self.actors])
        self._record(run)

    def _shares(self, windows: Windows) -> list[list[tuple[int, Tensor]]]:
        """Each actor's consecutive window groups, numbered."""
        return deal(list(enumerate(windows.groups("cuda" if self.crew.gpus else "cpu"))), len(self.actors))

    def _expand_block(self, index: int, weights: ray.ObjectRef, owner, job: Job, architecture: Architecture, run: RunDirectory) -> None:
        layer = f"layer {index + 1} of {run.num_blocks}"
        seconds: dict[str, float] = {}

        def stage(name: str) -> AbstractContextManager[None]:
            self._record(run, wait=False)
            self.reporter.stage(name, layer)
            return self._timed(name, layer, seconds)

        with stage("capture"):
            ray.get([actor.capture.remote(index, weights) for actor in self.actors])
        with stage("cluster"):
            fits = self._fit(index, len(architecture.router_groups))
            fitted = ray.get(fits)
            self.reporter.advance(0.3)
        with stage("solve"):
            tasks, solvers = self._assign(fitted)
            reports = ray.get(self._solve(index, fits, tasks, solvers))
            self.reporter.advance(0.6)
        self._record(run)
        with stage("propagate"):
            # Only what another actor solved moves; on one actor nothing does.
            finished = [solver.experts.remote(index, task) if len(self.actors) > 1 else None for task, solver in zip(tasks, solvers)]
            everywhere = ray.put(fitted)

            def from_others(actor) -> list[ray.ObjectRef]:
                return [experts for experts, solver in zip(finished, solvers) if solver != actor]

            written = owner.write.remote(index, everywhere, tasks, *from_others(owner))
            ray.get([actor.propagate.remote(index, everywhere, tasks, *from_others(actor)) for actor in self.actors])
        self.unrecorded = _Unrecorded(index, written, seconds, sorted(sum(reports, []), key=lambda report: (report["router"], report["expert"])))

    def _record(self, run: RunDirectory, wait: bool = True) -> None:
        """Note in the manifest that the last block's shard is written, which goes on beside the next block. wait: until it is (before
        the next shard is written, and at the end); otherwise only look whether it is."""
        last = self.unrecorded
        if last is None or not wait and not ray.wait([last.written], timeout=0)[0]:
            return
        layer = f"layer {last.index + 1} of {run.num_blocks}"
        with self._timed("write", layer, last.seconds):
            self.reporter.stage("write", layer)
            digest = ray.get(last.written)
        self.unrecorded = None
        for stage, seconds in last.seconds.items():
            run.add_seconds(stage, seconds)
        run.record_layer(last.index, digest, last.seconds, last.reports)
        for actor in self.actors:
            actor.forget.remote(last.index)
        self.reporter.advance(0.1)

    # An actor does what it is asked in the order of asking: everybody's tokens are asked for before anybody computes with them.

    def _fit(self, index: int, routers: int) -> list[ray.ObjectRef]:
        fitters = [self.actors[(index + router) % len(self.actors)] for router in range(routers)]
        elsewhere = [[actor.tokens.remote(router) for actor in self.actors if actor != fitter] for router, fitter in enumerate(fitters)]
        return [fitter.fit.remote(router, *tokens) for (router, fitter), tokens in zip(enumerate(fitters), elsewhere)]

    def _solve(self, index: int, fits: list[ray.ObjectRef], tasks: list[Task], solvers: list) -> list[ray.ObjectRef]:
        elsewhere = [[actor.tokens_of.remote(fits[task.router], task) for actor in self.actors if actor != solver]
                     for task, solver in zip(tasks, solvers)]
        return [solver.solve.remote(index, fits[task.router], task, *tokens) for task, solver, tokens in zip(tasks, solvers, elsewhere)]

    def _assign(self, fitted: list[dict]) -> tuple[list[Task], list]:
        """Deal every router's experts to the actors, large clusters and small ones alike, and so that each actor solves a
        router's experts together."""
        tasks, solvers = [], []
        for router, fit in enumerate(fitted):
            by_size = sorted(range(len(fit["counts"])), key=lambda expert: -fit["counts"][expert])
            for rank, actor in enumerate(self.actors):
                experts = sorted(by_size[rank::len(self.actors)])
                if experts:
                    tasks.append(Task(router, experts))
                    solvers.append(actor)
        return tasks, solvers

    # The rest

    def assemble(self, job: Job, source: Path, described: str, architecture: Architecture, run: RunDirectory) -> dict[str, str]:
        """Make the saved model from all layers; returns its files' hashes. `source`: the dense model's directory."""
        assembly = Assembly(source, run.path, job.num_clusters, architecture.router_groups, architecture.blocks, self.dtype,
                            {"dense_model": described, **job.recipe()})
        with self._timed("assemble"):
            self.reporter.stage("assemble")
            return self.restarting(lambda: ray.get(self.actors[0].assemble.remote(assembly, run.model)))

    def evaluate(self, what: str, directory: Path, windows: Windows, num_blocks: int) -> Perplexity:
        with self._timed(f"evaluate {what}"):
            losses = self.restarting(lambda: self._evaluate(what, directory, windows, num_blocks))
        return Perplexity.of(losses, windows.source, windows.length, self.dtype)

    def _evaluate(self, what: str, directory: Path, windows: Windows, num_blocks: int) -> list[float]:
        shares = self._shares(windows)
        ray.get([actor.begin_evaluation.remote(directory, dict(share)) for actor, share in zip(self.actors, shares)])
        for index in range(num_blocks):
            self.reporter.stage(f"evaluate {what}", f"layer {index + 1} of {num_blocks}")
            ray.get([actor.evaluate_block.remote(index) for actor in self.actors])
            self.reporter.advance(EVALUATION_COST)
        by_group = {number: losses for part in ray.get([actor.finish_evaluation.remote() for actor in self.actors]) for number, losses in part.items()}
        return [loss for number in sorted(by_group) for loss in by_group[number]]
