"""The demo: the embedded model with one expert and with several, calibrated and judged on windows of its own."""

import time
from pathlib import Path

from actors import jobs
from pipeline.config import Job

EXPERTS = (1, 8)
OPTIONS = dict(model="demo", dataset="self", sparsity="0.8", dataset_size=64, eval_size=32, seq_len=256, kmeans_restarts=3)


def run_demo(output_dir: str | None, actors: int | None, threads: int | None, verbose: bool) -> dict:
    """Returns what `demo --json` prints: the last run's keys, and every run under `runs`."""
    started = time.monotonic()
    root = Path(output_dir or "runs/demo").absolute()
    results = []
    for experts in EXPERTS:
        job = Job(**OPTIONS, num_clusters=experts, output_dir=str(root / f"k{experts}"), actors=actors, threads=threads, verbose=verbose, no_dense=bool(results))
        results.append(jobs.run(job))
    return results[-1] | {"runs": results, "dense_perplexity": results[0]["dense_perplexity"], "seconds": round(time.monotonic() - started, 3)}
