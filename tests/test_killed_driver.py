"""Its driver killed anywhere, the same command goes on and ends with the same bytes."""

import random
import signal

import pytest

from tests.conftest import run_job, start_command
from tests.jobs import assert_gone, shard_hashes, wait_for_stage

STAGES = ("propagate layer 2", "write layer 3", "assemble", "evaluate expanded layer 2")


@pytest.mark.parametrize("stages", [STAGES[:1], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["once", "at every stage"])
def test_kills_of_the_driver(stages, job, undisturbed, tmp_path):
    """SIGKILL again and again, each time a little further on and at a random moment of that stage; then it goes on to the end."""
    generator = random.Random(11)
    for stage in stages:
        process = start_command("run", *job, "--output-dir", tmp_path / "run")
        try:
            pids = wait_for_stage(process, stage, generator.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert_gone(pids)
    result = run_job(*job, "--output-dir", tmp_path / "run", "--resume", "require")
    assert result["layers_resumed"] >= (3 if stages == STAGES else 1)  # nothing that was finished is made again
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0])
    assert result["perplexity"] == undisturbed[1]["perplexity"]
    assert not list((tmp_path / "run").rglob("*.tmp-*"))
