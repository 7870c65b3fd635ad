"""A job that has passed every check that needs no Ray: its model, its windows, and what is measured of it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.architectures import Architecture
from pipeline.checkpoint import check_directory, read_manifest, windows_file
from pipeline.config import Job, digest
from pipeline.perplexity import Perplexity
from pipeline.preflight import Source
from pipeline.statistics import warnings_of
from pipeline.windows import Request, Windows, read_windows


@dataclass(frozen=True, eq=False)
class Prepared:
    """calibration, evaluation: windows, or the request where only the model can make them; no evaluation, if none is wanted."""

    job: Job
    source: Source
    architecture: Architecture
    calibration: Windows | Request
    evaluation: Windows | Request | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a run directory must hold to be this job's; the dtype is known on the cluster only, unless it is given."""
        job = self.job
        given = ({} if job.dtype == "auto" else {"dtype": job.dtype}) | ({"storage": job.storage} if job.storage else {})
        return {"model": self.source.fingerprint[:16], "calibration": self.calibration.digest()[:16]} | job.recipe() | given

    def kept_windows(self, kind: str, dtype: str) -> Windows | None:
        """The calibration or evaluation windows; None if they are still to be sampled from the model."""
        windows = getattr(self, kind)
        path = windows_file(self.job.run_directory, kind)
        if isinstance(windows, Windows):
            return windows
        if path.is_file():
            stored = Windows.load(path)
            if stored.source == sampled_source(windows, self.source, dtype) and stored.ids_WL.shape == (windows.count, windows.length):
                return stored
        return None

    def evaluations(self, manifest: dict[str, Any], windows: Windows, dtype: str) -> dict[str, str]:
        """What is to be measured, and the key of each measurement: one of the same key need not be made again, in whichever
        manifest it stands. Once all layers are there."""
        # The shards' hashes name the expanded model: an evaluation is reused only for the very same experts.
        models = {"expanded": digest({index: layer["hash"] for index, layer in manifest["layers"].items()})}
        models |= {} if self.job.no_dense else {"dense": self.source.fingerprint}
        return {what: digest({"what": what, "which": which, "windows": windows.digest(), "dtype": dtype}) for what, which in models.items()}

    def result(self) -> dict[str, Any] | None:
        """What `run --json` tells of a finished job, from its directory alone; None if anything is left to do. seconds: of all
        starts together."""
        run = self.job.run_directory
        manifest = read_manifest(run)
        if manifest is None or not _is_finished(run, manifest):
            return None
        dtype = manifest["identity"]["dtype"]
        calibration, evaluation = self.kept_windows("calibration", dtype), self.evaluation and self.kept_windows("evaluation", dtype)
        if calibration is None or evaluation is None and self.evaluation is not None:
            return None
        keys = {} if evaluation is None else self.evaluations(manifest, evaluation, dtype)
        stored = {what: manifest["evaluations"].get(key) for what, key in keys.items()}
        if None in stored.values():
            return None
        measured = {what: Perplexity(**{name: value for name, value in entry.items() if name != "what"}) for what, entry in stored.items()}
        return self._told(manifest, calibration, measured.get("expanded"), measured.get("dense"))

    def _told(self, manifest: dict[str, Any], calibration: Windows, expanded: Perplexity | None, dense: Perplexity | None) -> dict[str, Any]:
        run, layers = self.job.run_directory, manifest["layers"]
        shares = [share for layer in layers.values() for report in layer["experts"] for share in report["sparsity"].values()]
        return {
            "perplexity": expanded and expanded.perplexity, "dense_perplexity": dense and dense.perplexity,
            "windows": expanded and expanded.windows, "window_length": expanded and expanded.window_length,
            "measured_on": expanded and expanded.described(),
            "calibrated_on": f"{calibration.source}, {calibration.count} windows of {calibration.length} tokens",
            "model": self.source.described(), "sparsity": self.job.sparsity, "num_clusters": self.job.num_clusters,
            "measured_sparsity": sum(shares) / len(shares), "recipe": self.job.recipe(), "dtype": manifest["identity"]["dtype"],
            "model_dir": str(run / "model"), "run_dir": str(run),
            "model_bytes": _safetensors_bytes(run / "model"), "dense_bytes": _safetensors_bytes(self.source.directory),
            "warnings": warnings_of(layers), "seconds": round(sum(manifest["seconds"].values()), 3),
        }


def prepare(jobs: Sequence[Job]) -> list[Prepared]:
    """Check jobs of one model, and read their windows; what several of them ask for is read once. Raises UserError."""
    for job in jobs:
        check_directory(job.run_directory, job.recipe(), job.resume)
    source = preflight.find_model(jobs[0].model, jobs[0].model_size, jobs[0].revision, jobs[0].cache_dir)
    architectures = [preflight.check_shapes(job, source) for job in jobs]
    read = functools.cache(lambda request: read_or_sampled(request, source))
    prepared = [_prepare(job, source, architecture, read) for job, architecture in zip(jobs, architectures)]
    for one in prepared:
        check_directory(one.job.run_directory, one.identity, one.job.resume)
    return prepared


def _prepare(job: Job, source: Source, architecture: Architecture, read: Callable[[Request], Windows | Request]) -> Prepared:
    calibration = read(preflight.calibration_request(job, source))
    request = preflight.evaluation_request(job, source, calibration.length)
    evaluation = request and read(request)
    preflight.check_clusters(job, calibration.count * calibration.length)
    return Prepared(job, source, architecture, calibration, evaluation)


def read_or_sampled(request: Request, source: Source) -> Windows | Request:
    """The windows, or the request itself where only the model can make them."""
    if request.name == "self":
        return request
    windows = read_windows(request, source.tokenizer, source.text_config.vocab_size)
    preflight.check_windows(windows.length, source, request.option)
    return windows


def sampled_source(request: Request, source: Source, dtype: str) -> str:
    return f"self: sampled from the model, seed {request.seed} (model {source.fingerprint[:12]}, {dtype})"


def _is_finished(run: Path, manifest: dict[str, Any]) -> bool:
    """A layer or model found damaged is taken out of the manifest of a finished job, too."""
    whole = manifest.get("finished") and len(manifest["layers"]) == manifest["num_blocks"] and "model" in manifest
    return bool(whole) and all((run / "model" / name).is_file() for name in manifest["model"])


def _safetensors_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
