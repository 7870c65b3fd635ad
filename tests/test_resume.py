"""What a run directory makes of the next start: damaged files, other jobs, starting over."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import command, run_job
from tests.jobs import shard_hashes

pytestmark = pytest.mark.usefixtures("one_ray")


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A finished job's directory, to be spoilt, and its result."""
    shutil.copytree(undisturbed[0], tmp_path / "run")
    return tmp_path / "run", undisturbed[1]


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_files_are_named_and_made_again(job, finished):
    directory, result = finished
    before = shard_hashes(directory)
    damage(directory / "layers" / "layer_001.safetensors")
    damage(directory / "model" / "model-00003-of-00004.safetensors")
    outcome = command("run", *job, "--output-dir", directory, "--json")
    assert outcome.code == 0, outcome.err
    assert f"{directory}/layers/layer_001.safetensors is damaged; layer 1 is made again" in outcome.err
    assert f"{directory}/model/model-00003-of-00004.safetensors is damaged; the model is assembled again" in outcome.err
    assert outcome.json["layers_resumed"] == 2 and outcome.json["perplexity"] == result["perplexity"]
    assert shard_hashes(directory) == before


def test_another_job_is_refused(job, finished):
    outcome = command("run", *job, "--output-dir", finished[0], "--sparsity", "2:4", "--seed", 3)
    assert outcome.code == 2
    assert f"--output-dir {finished[0]} holds another job: it differs in sparsity (0.5 there, 2:4 here), seed (0 there, 3 here)" in outcome.err


def test_never_starts_over(job, finished):
    before = shard_hashes(finished[0])
    result = run_job(*job, "--output-dir", finished[0], "--resume", "never")
    assert result["layers_resumed"] == 0 and shard_hashes(finished[0]) == before
