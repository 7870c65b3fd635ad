"""The published script's perplexities on the reference windows.

The table was measured with the published script on an H100. Its one-expert row has no randomness but rounding, and rounding
moves it: with the Hessians perturbed by 1e-5, the textbook solver in float64 gave 152.0 to 154.4 in eleven draws (mean 153.1),
because one near tie in a mask changes everything after it. So that row is checked to 2 %, and the solver itself weight by
weight in test_solver.py. More experts depend on the KMeans optimum: no more than 2 % above, with the
published 100 restarts (with 10, seeds 0 to 3 gave 87.5 to 90.3 on a CPU for 16 experts at 0.8, where 2 % above is 90.23).
"""

import pytest

from tests.conftest import command, run_job

DENSE = {"pythia-mini": 32.78, "llama-mini": 36.20}

pytestmark = pytest.mark.usefixtures("one_ray")


def parity(shared, tmp_path, experts: int, sparsity: str, *more) -> dict:
    return run_job("--model", shared / "models" / "pythia-mini", "--dataset", shared / "parity" / "calibration_ids.npy", "--num-clusters", experts,
                   "--eval-dataset", shared / "parity" / "test_ids.npy", "--pca-reduction-factor", 8, "--sparsity", sparsity, "--dtype", "float32",
                   "--output-dir", tmp_path / "run", *more)


@pytest.mark.slow
def test_dense_llama(shared):
    result = command("eval", "--model", shared / "models" / "llama-mini", "--eval-dataset", shared / "parity" / "test_ids.npy", "--dtype", "float32", "--json").json
    assert result["perplexity"] == pytest.approx(DENSE["llama-mini"], rel=1e-3)
    assert result["windows"] == 128 and result["window_length"] == 512


@pytest.mark.slow
def test_dense_and_one_expert(shared, tmp_path):
    result = parity(shared, tmp_path, 1, "0.8")
    assert result["dense_perplexity"] == pytest.approx(DENSE["pythia-mini"], rel=1e-3)
    assert result["perplexity"] == pytest.approx(153.9, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("experts, sparsity, published", [(4, "0.8", 120.14), (16, "0.8", 88.46), (16, "0.5", 36.71)])
def test_several_experts(experts, sparsity, published, shared, tmp_path):
    assert parity(shared, tmp_path, experts, sparsity, "--no-dense", "--kmeans-restarts", 100)["perplexity"] <= 1.02 * published
