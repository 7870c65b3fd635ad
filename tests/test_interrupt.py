"""A job stopped or refused leaves nothing behind."""

import signal

from tests.conftest import command, start_command
from tests.jobs import assert_gone, wait_for_stage


def test_interrupt_leaves_nothing_running(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    pids = wait_for_stage(process, "cluster layer 1", 0)
    seen = command("status", tmp_path / "run", "--json")  # from elsewhere
    assert seen.code == 0 and seen.json["running"] and seen.json["progress"]["stage"] and f"Running: {seen.json['progress']['stage']}, " in seen.out
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    assert_gone(pids)
    watched = command("status", tmp_path / "run", "--watch", "--json")  # nobody works on it: nothing to wait for
    assert watched.code == 0 and not watched.json["running"] and watched.out.count("not finished") == 1


def test_two_drivers_do_not_share_a_directory(job, tmp_path):
    process = start_command("run", *job, "--output-dir", tmp_path / "run")
    try:
        wait_for_stage(process, "start", 0)
        outcome = command("run", *job, "--output-dir", tmp_path / "run")
        assert outcome.code == 2 and "is in use by another process" in outcome.err
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
