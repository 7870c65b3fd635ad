"""Whole jobs, from options to result: what the commands of the CLI call."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster import check_address, connected, size_crew
from actors.progress import EVALUATION_COST, Bar
from pipeline import preflight, statistics
from pipeline.card import write_card
from pipeline.checkpoint import PROGRESS, RunDirectory, windows_file
from pipeline.config import Job
from pipeline.errors import UserError
from pipeline.files import replacing
from pipeline.preflight import Source
from pipeline.prepared import Prepared, prepare, read_or_sampled, sampled_source
from pipeline.storage import Storage
from pipeline.windows import Request, Windows

if TYPE_CHECKING:
    from actors.conductor import Conductor

# Of a job as a whole; the others are recorded with each layer.
STAGES = ("sample", "assemble", "evaluate expanded", "evaluate dense", "start", "embed", "replay", "dense pass", "prepare")
WHOLE = "whole"


def run(job: Job) -> dict:
    """Expand, save and evaluate a model. Returns what `--json` prints. Raises UserError for what the user can put right."""
    started = time.monotonic()
    check_address(job.address)
    prepared = prepare([job])
    with performing([prepared], started) as performer:
        [result] = performer.perform(prepared)
        return result | (performer.profile(job.run_directory) if job.profile else {})


def evaluate(job: Job) -> dict:
    """Perplexity of a dense or a saved model, block by block from its files. Returns what `--json` prints."""
    started = time.monotonic()
    if job.eval_dataset == "none":
        raise UserError("--eval-dataset is none, but eval does nothing else; give a data set.")
    check_address(job.address)
    source = preflight.find_model(job.model, job.model_size, job.revision, job.cache_dir)
    windows = read_or_sampled(preflight.evaluation_request(job, source, None), source)
    with conducted(job, source, source.num_blocks * EVALUATION_COST) as conductor:
        if isinstance(windows, Request):
            windows = _sample(windows, source, conductor)
        measured = conductor.evaluate("expanded" if source.is_expanded else "dense", source.directory, windows, source.num_blocks)
    return {
        "perplexity": measured.perplexity, "dense_perplexity": None if source.is_expanded else measured.perplexity,
        "windows": measured.windows, "window_length": measured.window_length, "measured_on": measured.described(),
        "model": source.described(), "dtype": conductor.dtype, "model_dir": str(source.directory), "devices": conductor.devices,
        "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in conductor.clock.seconds.items()},
        "seconds": round(time.monotonic() - started, 3),
    }


@contextlib.contextmanager
def conducted(job: Job, source: Source, steps: float) -> Iterator["Conductor"]:
    """A conductor with its crew, on Ray, for as long as this lasts. steps: of the bar."""
    with connected(job.address, job.verbose):
        from actors.conductor import Conductor  # `connected` has loaded it, and with it all that computes

        crew = size_crew(job.actors, job.threads, job.gpus_per_actor)
        dtype = job.dtype_on(crew.device_type, source.checkpoint_dtype)
        bar = Bar(steps, job.verbose)
        conductor = Conductor(crew, dtype, bar, job.verbose, job.stall_limit)
        try:
            bar.stage("start", crew.described())
            conductor.start()
            yield conductor
        finally:
            conductor.stop()
            bar.close()


@contextlib.contextmanager
def performing(groups: Sequence[Sequence[Prepared]], started: float) -> Iterator["Performer"]:
    """Their run directories locked, and a crew for all of them. groups: jobs of one model, as they are to be performed.
    started: when they began to be prepared, by the monotonic clock."""
    preparing = time.monotonic() - started
    everyone = [one for group in groups for one in group]
    with contextlib.ExitStack() as stack:
        directories = {one.job.run_directory: stack.enter_context(_opened(one.job)) for one in everyone}
        with conducted(everyone[0].job, everyone[0].source, _steps(groups)) as conductor:
            from actors.planning import check_fits  # as above

            check_fits(everyone, conductor.crew.size, conductor.dtype)
            conductor.clock.seconds["prepare"] = preparing
            yield Performer(conductor, directories, started)


def _opened(job: Job) -> RunDirectory:
    storage = Storage(job.storage) if job.storage else None
    if storage is not None:
        storage.check()
    return RunDirectory(job.run_directory, storage)


def _steps(groups: Sequence[Sequence[Prepared]]) -> float:
    """Of the bar: a block of one job is one; of jobs together, most of it is done once. The dense model is judged once on the same windows."""
    everyone = [one for group in groups for one in group]
    judged = [one for one in everyone if one.evaluation is not None]
    dense = {one.evaluation.digest() for one in judged if not one.job.no_dense}
    return everyone[0].source.num_blocks * (sum(0.9 + 0.1 * len(group) for group in groups) + EVALUATION_COST * (len(judged) + len(dense)))


class Performer:
    """Takes jobs of one model from their windows to their results, over one crew. What it has sampled or measured for one job serves the others.

    `evaluations`: by key, as manifests hold them.
    """

    def __init__(self, conductor: "Conductor", directories: dict[Path, RunDirectory], started: float):
        self.conductor, self.directories = conductor, directories
        self.sampled: dict[Request, Windows] = {}
        self.evaluations: dict[str, dict] = {}
        self._started, self._counted = started, {}

    def perform(self, group: Sequence[Prepared]) -> list[dict]:
        """Expand, save and evaluate; returns what `run --json` prints. Several together are of dense propagation and the same windows."""
        first, conductor = group[0], self.conductor
        conductor.reporter.path = first.job.run_directory / PROGRESS
        conductor.crew.losses.clear()  # that many at the same place of one job are too many, not of all
        runs = [self.directories[one.job.run_directory] for one in group]
        windows = [self._open(one, run) for one, run in zip(group, runs)]
        resumed = [one.source.num_blocks - len(run.missing_layers()) for one, run in zip(group, runs)]
        conductor.reporter.advance(sum(resumed) / len(group))
        if left := [(one.job, run) for one, run in zip(group, runs) if run.missing_layers()]:
            conductor.expand(left, first.source, first.architecture, windows[0][0])
        shared = self.spent(len(group))
        return [self._finish(one, run, evaluation, shared) | {"layers_resumed": done}
                for one, run, (_, evaluation), done in zip(group, runs, windows, resumed)]

    def start_over(self) -> None:
        """After jobs that failed: actors that hold nothing of them, nor do the seconds of those that follow."""
        self.conductor.start()
        self.spent()

    def profile(self, directory: Path) -> dict:
        """Write where the time of all jobs went."""
        return {"profile_dir": str(directory / "profile"), "profile": self.conductor.profile(directory / "profile")}

    def spent(self, jobs: int = 1) -> dict[str, float]:
        """Seconds by stage since it was last asked, and all of them as `WHOLE`: what each of so many jobs is charged with."""
        now = {WHOLE: time.monotonic() - self._started, **self.conductor.clock.seconds}
        spent = {stage: (seconds - self._counted.get(stage, 0.0)) / jobs for stage, seconds in now.items()}
        self._counted = now
        return {stage: seconds for stage, seconds in spent.items() if seconds > 0}

    def _open(self, one: Prepared, run: RunDirectory) -> tuple[Windows, Windows | None]:
        """The run directory is the job's. Returns its calibration and evaluation windows, as they now lie there."""
        if not run.manifest:  # else it was tried before, together with others
            for warning in run.open_job(one.identity | {"dtype": self.conductor.dtype}, one.source.num_blocks, one.job.resume):
                self.conductor.reporter.note(warning)
        with replacing(run.path / "config.yaml") as temporary:
            temporary.write_text(one.job.to_yaml())
        self.evaluations |= run.manifest["evaluations"]
        return self._settled(one, "calibration"), one.evaluation and self._settled(one, "evaluation")

    def _settled(self, one: Prepared, kind: str) -> Windows:
        windows = one.kept_windows(kind, self.conductor.dtype)
        if windows is None:
            request = getattr(one, kind)
            if request not in self.sampled:
                self.sampled[request] = _sample(request, one.source, self.conductor)
            windows = self.sampled[request]
        path = windows_file(one.job.run_directory, kind)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            windows.save(temporary)
        return windows

    def _finish(self, one: Prepared, run: RunDirectory, evaluation: Windows | None, spent: dict[str, float]) -> dict:
        """All layers are there. spent: seconds by stage up to here."""
        conductor = self.conductor
        statistics.write_expert_table(run.manifest["layers"], run.path / "stats" / "experts.parquet")
        if "model" not in run.manifest:
            run.manifest["model"] = conductor.assemble(one.job, one.source, one.architecture, run.storage, run.model)
            run.save()
        if evaluation is not None:
            self._evaluate(one, run, evaluation)
        own = self.spent()
        spent = {stage: spent.get(stage, 0.0) + own.get(stage, 0.0) for stage in spent | own}
        for stage in STAGES:
            run.add_seconds(stage, spent.get(stage, 0.0))
        run.manifest["finished"] = True
        run.save()
        result = one.result()
        write_card(run.model, Path(one.source.name).name, one.source.described(), result)
        whole = spent.pop(WHOLE)
        return result | {"actors": conductor.crew.size.actors, "devices": conductor.devices, "seconds": round(whole, 3), **conductor.usage,
                         "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in spent.items()}}

    def _evaluate(self, one: Prepared, run: RunDirectory, windows: Windows) -> None:
        """Measure what no manifest holds yet."""
        for what, key in one.evaluations(run.manifest, windows, self.conductor.dtype).items():
            if key not in self.evaluations:
                directory = run.model if what == "expanded" else one.source.directory
                measured = self.conductor.evaluate(what, directory, windows, one.source.num_blocks, run)
                self.evaluations[key] = {"what": what, **measured.as_dict()}
            run.manifest["evaluations"][key] = self.evaluations[key]
            run.save()


def _sample(request: Request, source: Source, conductor: "Conductor") -> Windows:
    return Windows(conductor.sample(source, request.count, request.length, request.seed), sampled_source(request, source, conductor.dtype))
