"""A whole job on the embedded model, from options to perplexities, without the start of processes: random tokens, 128 + 128
windows of 512, 16 experts at 0.5, dense evaluation included."""

import numpy as np

from pipeline.config import Job
from tests.benchmarks.bench_block import MINI
from tests.benchmarks.measure import product_rate
from tests.conftest import run_job

BLOCKS, VOCABULARY = 4, 2048


def test_job(tmp_path, benchmark, record):
    for seed, name in enumerate(("calibration", "evaluation")):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, VOCABULARY, (MINI.windows, MINI.length)))
    job = Job(model="demo", num_clusters=16, sparsity="0.5", dtype="float32", dataset=str(tmp_path / "calibration.npy"),
              eval_dataset=str(tmp_path / "evaluation.npy"))
    options = [part for name in ("model", "num_clusters", "sparsity", "dtype", "dataset", "eval_dataset")
               for part in ("--" + name.replace("_", "-"), str(getattr(job, name)))]
    result = benchmark.pedantic(lambda: run_job(*options, "--output-dir", tmp_path / "run"), rounds=1)
    stages = result["seconds_by_stage"]
    start = stages.pop("start")
    evaluations = 2 * (BLOCKS * MINI.dense_operations() + 2 * MINI.tokens * MINI.hidden * VOCABULARY) / product_rate()
    record("whole job, pythia-mini, 16 experts, 0.5", sum(stages.values()), BLOCKS * MINI.floor(job) + evaluations, start=start, **stages)
