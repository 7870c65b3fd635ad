"""The grid of a sweep: jobs that differ in a few options, each with a place in the sweep's directory.

    sweep/
      0.5-k1/ 0.5-k16/ 2of4-k16-dense/ ...     each a run directory of its own
      sweep.parquet sweep.md sweep.png
"""

import itertools
from pathlib import Path
from typing import Any

from pipeline.config import ROUNDING, Job, job_of, read_fields
from pipeline.errors import UserError

AXES = ("sparsity", "num_clusters", "propagation", "quantize", "bits", "seed")


def make_grid(options: dict[str, Any], config: str | None = None) -> list[Job]:
    """The jobs of options, and of a YAML file beside them, in which axes may have several values: one for each combination.
    All have the sweep's own --output-dir. Raises UserError, one sentence, if a combination makes no sense."""
    given = read_fields(options, config)
    axes = {name: _values(given[name]) for name in AXES if name in given}
    jobs = {}
    for values in itertools.product(*axes.values()):
        fields = given | dict(zip(axes, values))
        if len(axes.get("quantize", ())) > 1 and not fields["quantize"]:  # beside quantized ones: what they are compared with
            fields = {name: value for name, value in fields.items() if name not in ROUNDING}
        job = job_of(fields, config)
        jobs[name_of(job)] = job
    return list(jobs.values())


def _values(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) and value else [value]


def name_of(job: Job) -> str:
    """Of its directory in the sweep's; the same in whatever grid it stands."""
    bits = f"-{job.bits}bit" if job.quantize else ""
    seed = f"-seed{job.seed}" if job.seed else ""
    return f"{job.sparsity.replace(':', 'of')}{bits}-k{job.num_clusters}{'-dense' if job.propagation == 'dense' else ''}{seed}"


def sweep_directory(job: Job) -> Path:
    """Of the sweep that a job of the grid belongs to. Raises UserError if that is a run directory."""
    name = job.model if job.model_size is None else f"{job.model}-{job.model_size}"
    root = Path(job.output_dir or f"runs/{Path(name).name}-sweep").absolute()
    if (root / "manifest.json").exists():
        raise UserError(f"--output-dir {root} holds a job; a sweep needs a directory of its own, in which each of its jobs has one.")
    return root


def placed(job: Job, root: Path) -> Job:
    """A job of the grid, with its own place in the sweep's directory and storage."""
    name = name_of(job)
    storage = job.storage and f"{job.storage.rstrip('/')}/{name}"
    return job.model_copy(update={"output_dir": str(root / name), "storage": storage})
