"""What a run directory makes of the next start: damaged files, other jobs, starting over."""

from pathlib import Path

import pytest

from tests.conftest import command, run_job
from tests.jobs import make_inputs, shard_hashes


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return directory, run_job(*job, "--output-dir", directory)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_files_are_named_and_made_again(job, undisturbed):
    directory, result = undisturbed
    before = shard_hashes(directory)
    damage(directory / "layers" / "layer_001.safetensors")
    damage(directory / "model" / "model-00003-of-00004.safetensors")
    outcome = command("run", *job, "--output-dir", directory, "--json")
    assert outcome.code == 0, outcome.err
    assert f"{directory}/layers/layer_001.safetensors is damaged; layer 1 is made again" in outcome.err
    assert f"{directory}/model/model-00003-of-00004.safetensors is damaged; the model is assembled again" in outcome.err
    assert outcome.json["layers_resumed"] == 2 and outcome.json["perplexity"] == result["perplexity"]
    assert shard_hashes(directory) == before


def test_another_job_is_refused(job, undisturbed):
    outcome = command("run", *job, "--output-dir", undisturbed[0], "--sparsity", "2:4", "--seed", 3)
    assert outcome.code == 2
    assert f"--output-dir {undisturbed[0]} holds another job: it differs in sparsity (0.5 there, 2:4 here), seed (0 there, 3 here)" in outcome.err


def test_never_starts_over(job, undisturbed):
    before = shard_hashes(undisturbed[0])
    result = run_job(*job, "--output-dir", undisturbed[0], "--resume", "never")
    assert result["layers_resumed"] == 0 and shard_hashes(undisturbed[0]) == before
