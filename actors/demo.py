"""The demo: the embedded model with one expert and with several, calibrated and judged on windows of its own."""

import time
from pathlib import Path

from actors.jobs import performing
from pipeline.config import Job
from pipeline.prepared import prepare

EXPERTS = (1, 8)
OPTIONS = dict(model="demo", dataset="self", sparsity="0.8", dataset_size=64, eval_size=32, seq_len=256, kmeans_restarts=3)


def run_demo(output_dir: str | None, actors: int | None, threads: int | None, verbose: bool) -> dict:
    """Returns what `demo --json` prints: the last run's keys, and every run under `runs`."""
    started = time.monotonic()
    root = Path(output_dir or "runs/demo")
    options = OPTIONS | dict(actors=actors, threads=threads, verbose=verbose)
    prepared = prepare([Job(**options, num_clusters=experts, output_dir=str(root / f"k{experts}")) for experts in EXPERTS])
    with performing([[one] for one in prepared], started) as performer:
        results = [result for one in prepared for result in performer.perform([one])]
    return results[-1] | {"runs": results, "seconds": round(time.monotonic() - started, 3)}
