"""The same shards, whoever computed them."""

import numpy as np
import pytest

from tests.conftest import run_job
from tests.jobs import make_inputs, shard_hashes
from tests.models import save_tiny, token_windows

pytestmark = pytest.mark.usefixtures("one_ray")


def layer_bytes(run) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.glob("layers/*.safetensors"))]


def test_one_and_two_actors_write_the_same_bytes(tmp_path):
    """20 windows are three groups of unequal size, so the shares of two actors differ."""
    save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=2, max_position_embeddings=512)
    np.save(tmp_path / "ids.npy", token_windows(20, 512).numpy())
    results = [
        run_job("--model", tmp_path / "model", "--dataset", tmp_path / "ids.npy", "--eval-dataset", tmp_path / "ids.npy", "--eval-size", 12, "--num-clusters", 4, "--no-dense",
                "--kmeans-restarts", 2, "--actors", actors, "--activations", activations, "--threads", 1, "--output-dir", tmp_path / str(actors))
        for actors, activations in ((1, "auto"), (2, "disk"))]
    assert [result["actors"] for result in results] == [1, 2]
    assert results[0]["activations"]["disk"] == 0 < results[0]["activations"]["host"] and results[1]["activations"]["host"] == 0
    assert 0.3 < results[0]["busy_share"] <= 1 and results[1]["bytes_exchanged"] > results[0]["bytes_exchanged"]
    assert layer_bytes(tmp_path / "1") == layer_bytes(tmp_path / "2")
    assert results[0]["perplexity"] == results[1]["perplexity"]


def test_more_actors_than_window_groups_and_experts(tmp_path):
    """One group of windows and one expert: the second actor has nothing of either, and the job ends the same."""
    options = make_inputs(tmp_path)
    np.save(tmp_path / "few.npy", np.load(tmp_path / "calibration.npy")[:8])
    options += ["--dataset", tmp_path / "few.npy", "--eval-dataset", tmp_path / "few.npy", "--num-clusters", 1]
    results = [run_job(*options, "--actors", actors, "--output-dir", tmp_path / str(actors)) for actors in (1, 2)]
    assert shard_hashes(tmp_path / "1") == shard_hashes(tmp_path / "2")
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"])


def test_empty_clusters_fall_back_and_are_reported(tmp_path):
    """Two distinct tokens for four clusters: the empty experts are solved on all of the layer's tokens, with a warning."""
    options = make_inputs(tmp_path)
    np.save(tmp_path / "two.npy", np.tile([[5], [7]], (4, 16)))
    result = run_job(*options, "--dataset", tmp_path / "two.npy", "--eval-dataset", "none", "--num-clusters", 4, "--output-dir", tmp_path / "run")
    assert any("had no tokens and were solved on all tokens of their layer" in warning for warning in result["warnings"])
