"""Jobs on a GPU: several actors on one, and one with too little memory."""

import pytest
import torch

from tests.conftest import command, run_job

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.usefixtures("one_ray")]

OPTIONS = ("--model", "demo", "--dataset", "self", "--dataset-size", 64, "--eval-size", 16, "--seq-len", 512, "--num-clusters", 4, "--dtype", "float32")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_job(*OPTIONS, "--actors", 1, "--output-dir", tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("propagation", ["sparse", "dense"])
def test_two_actors_share_a_gpu(alone, propagation, tmp_path):
    both = run_job(*OPTIONS, "--gpus-per-actor", 0.5, "--actors", 2, "--propagation", propagation, "--output-dir", tmp_path / "run")
    assert both["actors"] == 2 and both["perplexity"] == pytest.approx(alone["perplexity"], rel=0.03)
    assert both["dense_perplexity"] == pytest.approx(alone["dense_perplexity"], rel=1e-4)


def test_activations_make_room_when_memory_runs_out(alone, tmp_path):
    """A real torch.OutOfMemoryError: a good gigabyte, which --activations device tries to fill with what is kept."""
    outcome = command("run", *OPTIONS, "--gpus-per-actor", 0.017, "--dataset-size", 400, "--actors", 1, "--activations", "device", "--no-dense",
                      "--output-dir", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["activations"]["device"] == 0 < outcome.json["activations"]["host"]


def test_far_too_little_memory_is_refused_before_anything_is_loaded(tmp_path):
    outcome = command("run", *OPTIONS, "--gpus-per-actor", 0.0005, "--actors", 1, "--output-dir", tmp_path / "run")
    assert outcome.code == 2 and "even with activations on disk" in outcome.err.split("Error: ")[1] and "sample" not in outcome.err
