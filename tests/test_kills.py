"""Killed anywhere, the same command goes on and ends with the same bytes."""

import os
import random
import signal
import time

from tests.conftest import command, run_job, start_command
from tests.jobs import actors_of, alive, shard_hashes


def wait_for_stage(process, stage: str, delay: float) -> list[int]:
    """Until the job says that it is in a stage, and a moment longer; returns its process and its actors'."""
    for line in process.stderr:
        if stage in line:
            time.sleep(delay)
            return [process.pid, *actors_of(process.pid)]
    raise AssertionError(f"the job ended before it came to {stage!r}")


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in pids), "actors outlive their job"


def test_kills_of_the_driver(job, undisturbed, tmp_path):
    """SIGKILL again and again, each time a little further on and at a random moment of that stage; then it goes on to the end."""
    generator = random.Random(11)
    for stage in ("start", "cluster layer 1", "solve layer 2", "write layer 3", "assemble", "evaluate expanded layer 2"):
        process = start_command("run", *job, "--output-dir", tmp_path / "run")
        try:
            pids = wait_for_stage(process, stage, generator.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert_gone(pids)
    result = run_job(*job, "--output-dir", tmp_path / "run", "--resume", "require")
    assert result["layers_resumed"] == 3  # nothing that was finished is made again
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0])
    assert result["perplexity"] == undisturbed[1]["perplexity"]
    assert not list((tmp_path / "run").rglob("*.tmp-*"))


def test_kills_of_an_actor(job, undisturbed, tmp_path):
    """The job itself goes on: a new crew replays what is on disk."""
    process = start_command("run", *job, "--output-dir", tmp_path / "run", "--actors", 1, "--json")
    for stage in ("solve layer 1", "propagate layer 2", "evaluate expanded"):
        wait_for_stage(process, stage, 0)
        os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "An actor died; starting 1 anew" in err
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0])


def test_an_actor_that_always_dies_ends_the_job_with_a_sentence(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    for _ in range(3):
        wait_for_stage(process, "capture layer 1", 0)
        os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and "3 crews of actors died one after the other" in err and "Traceback" not in err


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
