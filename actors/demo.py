"""The demo: the embedded model with one expert and with several, calibrated and judged on windows of its own."""

import shutil
import time
from pathlib import Path

from actors import jobs
from actors.cluster import connected, stop_actors
from pipeline.checkpoint import check_directory
from pipeline.config import Job
from pipeline.files import replacing

EXPERTS = (1, 8)
OPTIONS = dict(model="demo", dataset="self", sparsity="0.8", dataset_size=64, eval_size=32, seq_len=256, kmeans_restarts=3)


def run_demo(output_dir: str | None, actors: int | None, threads: int | None, verbose: bool) -> dict:
    """Returns what `demo --json` prints: the last run's keys, and every run under `runs`."""
    started = time.monotonic()
    root = Path(output_dir or "runs/demo").absolute()
    directories = [root / f"k{experts}" for experts in EXPERTS]
    results, crew = [], []
    with connected(None, verbose):
        for experts, directory in zip(EXPERTS, directories):
            job = Job(**OPTIONS, num_clusters=experts, output_dir=str(directory), actors=actors, threads=threads, verbose=verbose, no_dense=bool(results))
            check_directory(directory, job.recipe(), job.resume)
            if results:  # the same windows serve every run
                _share_windows(directories[0] / "windows", directory / "windows")
            results.append(jobs.run(job, crew))
        stop_actors(crew)
    return results[-1] | {"runs": results, "dense_perplexity": results[0]["dense_perplexity"], "seconds": round(time.monotonic() - started, 3)}


def _share_windows(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.safetensors"):
        with replacing(target / file.name) as temporary:
            shutil.copy(file, temporary)
