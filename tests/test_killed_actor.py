"""An actor killed, the job goes on by itself; a job stopped or refused leaves nothing behind."""

import os
import signal

from tests.conftest import command, start_command
from tests.jobs import actors_of, assert_gone, shard_hashes, wait_for_stage


def test_kills_of_an_actor(job, undisturbed, tmp_path):
    """The job itself goes on: a new crew replays what is on disk."""
    process = start_command("run", *job, "--output-dir", tmp_path / "run", "--actors", 1, "--json")
    for stage in ("solve layer 1", "propagate layer 2", "evaluate expanded"):
        wait_for_stage(process, stage, 0)
        os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "was lost" in err and "the crew starts anew, and goes on from what is on disk" in err
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0])


def test_an_actor_that_always_dies_ends_the_job_with_a_sentence(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    for _ in range(3):
        wait_for_stage(process, "capture layer 1", 0)
        os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and "Actors were lost 3 times at the same place (capture layer 2 of 3" in err and "Traceback" not in err


def test_interrupt_leaves_nothing_running(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    pids = wait_for_stage(process, "cluster layer 1", 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    assert_gone(pids)


def test_two_drivers_do_not_share_a_directory(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    try:
        wait_for_stage(process, "start", 0)
        outcome = command("run", *job, "--output-dir", tmp_path / "run")
        assert outcome.code == 2 and "is in use by another process" in outcome.err
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
