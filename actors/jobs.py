"""Whole jobs, from options to result: what the commands of the CLI call."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster import check_address, connected, size_crew
from actors.progress import EVALUATION_COST, Bar
from pipeline import preflight, statistics
from pipeline.architectures import Architecture
from pipeline.card import write_card
from pipeline.checkpoint import RunDirectory, check_directory
from pipeline.config import Job, digest
from pipeline.errors import UserError
from pipeline.files import replacing
from pipeline.perplexity import Perplexity
from pipeline.preflight import Source
from pipeline.storage import Storage
from pipeline.windows import Request, Windows, read_windows

if TYPE_CHECKING:
    from actors.conductor import Conductor


def run(job: Job, kept: list | None = None) -> dict:
    """Expand, save and evaluate a model. Returns what `--json` prints. Raises UserError for what the user can put right.

    kept: actors that outlive the job, for the next one of the same device, dtype and threads; the caller stops them.
    """
    started = time.monotonic()
    check_directory(job.run_directory, job.recipe(), job.resume)
    check_address(job.address)
    source = preflight.find_model(job.model, job.model_size, job.revision, job.cache_dir)
    architecture = preflight.check_shapes(job, source)
    reading = time.monotonic()
    calibration = _read(preflight.calibration_request(job, source), source)
    request = preflight.evaluation_request(job, source, calibration.length)
    evaluation = request and _read(request, source)
    for windows, option in ((calibration, "--dataset"), (evaluation, "--eval-dataset")):
        if isinstance(windows, Windows):
            preflight.check_windows(windows.length, source, option)
    preflight.check_clusters(job, calibration.count * calibration.length)
    reading = time.monotonic() - reading
    identity = {"model": source.fingerprint[:16], "calibration": calibration.digest()[:16]} | job.recipe() | ({} if job.dtype == "auto" else {"dtype": job.dtype}) | ({"storage": job.storage} if job.storage else {})
    check_directory(job.run_directory, identity, job.resume)
    with _opened(job) as directory, connected(job.address, job.verbose):
        from actors.conductor import Conductor  # `connected` has loaded it, and with it all that computes

        crew = size_crew(job.actors, job.threads, job.gpus_per_actor)
        dtype = job.dtype_on("cuda" if crew.gpus else "cpu", source.checkpoint_dtype)
        bar = Bar(source.num_blocks * (1.0 + EVALUATION_COST * (evaluation is not None) * (2 - job.no_dense)), job.verbose)
        conductor = Conductor(crew, dtype, bar, job.verbose, job.stall_limit, kept)
        conductor.clock.seconds["windows"] = reading
        try:
            bar.stage("start", crew.described())
            conductor.start()
            result = _Run(job, source, architecture, directory, conductor, bar).finish(identity | {"dtype": dtype}, calibration, evaluation, started)
            if job.profile:
                result |= {"profile_dir": str(directory.path / "profile"), "profile": conductor.profile(directory.path / "profile")}
            return result
        finally:
            conductor.stop()
            bar.close()


@dataclass
class _Run:
    job: Job
    source: Source
    architecture: Architecture
    directory: RunDirectory
    conductor: "Conductor"
    bar: Bar

    def finish(self, identity: dict, calibration: Windows | Request, evaluation: Windows | Request | None, started: float) -> dict:
        job, source, run, conductor = self.job, self.source, self.directory, self.conductor
        for warning in run.open_job(identity, source.num_blocks, job.resume):
            self.bar.note(warning)
        with replacing(run.path / "config.yaml") as temporary:
            temporary.write_text(job.to_yaml())
        calibration = self._settled(calibration, "calibration")
        evaluation = evaluation and self._settled(evaluation, "evaluation")
        done = source.num_blocks - len(run.missing_layers())
        self.bar.advance(done)
        conductor.expand([(job, run)], source, self.architecture, calibration)
        layers = run.manifest["layers"]
        statistics.write_expert_table(layers, run.path / "stats" / "experts.parquet")
        if "model" not in run.manifest:
            run.manifest["model"] = conductor.assemble(job, source, self.architecture, run.storage, run.model)
            run.save()
        # The shards' hashes name the expanded model: an evaluation is reused only for the very same experts.
        made = digest({index: layer["sha256"] for index, layer in layers.items()})
        expanded = evaluation and self._evaluated("expanded", made, run.model, evaluation)
        dense = None if job.no_dense or not evaluation else self._evaluated("dense", source.fingerprint, source.directory, evaluation)
        for stage in ("sample", "assemble", "evaluate expanded", "evaluate dense", "start", "embed", "replay", "dense pass", "windows"):
            run.add_seconds(stage, conductor.clock.seconds.get(stage, 0.0))
        run.manifest["finished"] = True
        run.save()
        result = self._result(calibration, expanded, dense, done) | {"seconds": round(time.monotonic() - started, 3)}
        write_card(run.model, Path(source.name).name, source.described(), result)
        return result

    def _settled(self, windows: Windows | Request, kind: str) -> Windows:
        """The windows as they now lie in the run directory. What could not be read is sampled from the model, unless it lies
        there already."""
        path = self.directory.windows / f"{kind}.safetensors"
        if isinstance(windows, Request):
            if path.is_file():
                stored = Windows.load(path)
                if stored.source == _sampled_source(windows, self.source, self.conductor) and stored.ids_WL.shape == (windows.count, windows.length):
                    return stored
            windows = _sample(windows, self.source, self.conductor)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            windows.save(temporary)
        return windows

    def _evaluated(self, what: str, which: str, directory: Path, windows: Windows) -> Perplexity:
        key = digest({"what": what, "which": which, "windows": windows.digest(), "dtype": self.conductor.dtype})
        stored = self.directory.manifest["evaluations"].get(key)
        if stored is None:
            measured = self.conductor.evaluate(what, directory, windows, self.source.num_blocks, self.directory)
            stored = self.directory.manifest["evaluations"][key] = {"what": what, **measured.as_dict()}
            self.directory.save()
        return Perplexity(**{name: value for name, value in stored.items() if name != "what"})

    def _result(self, calibration: Windows, expanded: Perplexity | None, dense: Perplexity | None, resumed: int) -> dict:
        run = self.directory
        reports = [report for layer in run.manifest["layers"].values() for report in layer["experts"]]
        shares = [share for report in reports for share in report["sparsity"].values()]
        return {
            "perplexity": expanded and expanded.perplexity, "dense_perplexity": dense and dense.perplexity,
            "windows": expanded and expanded.windows, "window_length": expanded and expanded.window_length,
            "measured_on": expanded and expanded.described(),
            "calibrated_on": f"{calibration.source}, {calibration.count} windows of {calibration.length} tokens",
            "model": self.source.described(), "sparsity": self.job.sparsity, "num_clusters": self.job.num_clusters,
            "measured_sparsity": sum(shares) / len(shares), "recipe": self.job.recipe(), "dtype": self.conductor.dtype,
            "model_dir": str(run.model), "run_dir": str(run.path),
            "model_bytes": sum(file.stat().st_size for file in run.model.glob("*.safetensors")),
            "dense_bytes": sum(file.stat().st_size for file in self.source.directory.glob("*.safetensors")),
            "layers_resumed": resumed, "actors": self.conductor.crew.size.actors, "devices": self.conductor.devices,
            "warnings": statistics.warnings_of(run.manifest["layers"]),
            "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in self.conductor.clock.seconds.items()},
        }


def evaluate(job: Job) -> dict:
    """Perplexity of a dense or a saved model, block by block from its files. Returns what `--json` prints."""
    started = time.monotonic()
    if job.eval_dataset == "none":
        raise UserError("--eval-dataset is none, but eval does nothing else; give a data set.")
    check_address(job.address)
    source = preflight.find_model(job.model, job.model_size, job.revision, job.cache_dir)
    windows = _read(preflight.evaluation_request(job, source, None), source)
    if isinstance(windows, Windows):
        preflight.check_windows(windows.length, source, "--eval-dataset")
    with connected(job.address, job.verbose):
        from actors.conductor import Conductor  # `connected` has loaded it, and with it all that computes

        crew = size_crew(job.actors, job.threads, job.gpus_per_actor)
        dtype = job.dtype_on("cuda" if crew.gpus else "cpu", source.checkpoint_dtype)
        bar = Bar(source.num_blocks * EVALUATION_COST, job.verbose)
        conductor = Conductor(crew, dtype, bar, job.verbose, job.stall_limit)
        try:
            bar.stage("start")
            conductor.start()
            if isinstance(windows, Request):
                windows = _sample(windows, source, conductor)
            measured = conductor.evaluate("expanded" if source.is_expanded else "dense", source.directory, windows, source.num_blocks)
        finally:
            conductor.stop()
            bar.close()
    return {
        "perplexity": measured.perplexity, "dense_perplexity": None if source.is_expanded else measured.perplexity,
        "windows": measured.windows, "window_length": measured.window_length, "measured_on": measured.described(),
        "model": source.described(), "dtype": dtype, "model_dir": str(source.directory), "devices": conductor.devices,
        "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in conductor.clock.seconds.items()},
        "seconds": round(time.monotonic() - started, 3),
    }


def _opened(job: Job) -> RunDirectory:
    storage = Storage(job.storage) if job.storage else None
    if storage is not None:
        storage.check()
    return RunDirectory(job.run_directory, storage)


def _read(request: Request, source: Source) -> Windows | Request:
    """The windows, or the request itself where only the model can make them."""
    if request.name == "self":
        return request
    return read_windows(request, source.tokenizer, source.text_config.vocab_size)


def _sampled_source(request: Request, source: Source, conductor: "Conductor") -> str:
    return f"self: sampled from the model, seed {request.seed} (model {source.fingerprint[:12]}, {conductor.dtype})"


def _sample(request: Request, source: Source, conductor: "Conductor") -> Windows:
    return Windows(conductor.sample(source, request.count, request.length, request.seed), _sampled_source(request, source, conductor))
