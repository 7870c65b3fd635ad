"""Actors and nodes that die, hang or find the disk full at every stage: the job goes on, or stops with a sentence and goes on at the
next start; in the end it has the bytes of an undisturbed run, and nothing is left behind.

The driver runs here; what is done to its actors is done to real processes, at the moment at which the job says where it is, or a little
later.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from actors import jobs
from actors.progress import Bar
from tests.conftest import command
from tests.jobs import LAYERS, actors_of, shard_hashes


class Saboteur:
    """Does something at given stages, once each: `at[(stage, layer)] = what`. Later: a random moment, up to `delay` seconds."""

    def __init__(self, seed: int, delay: float):
        self.at, self.done, self.notes = {}, [], []
        self._random, self.delay = random.Random(seed), delay

    def told(self, stage: str, detail: str) -> None:
        layer = int(detail.split()[1]) if detail.startswith("layer") else 0
        act = self.at.pop((stage, layer), None)
        if act is not None:
            self.done.append((stage, layer))
            threading.Timer(self._random.uniform(0, self.delay), act).start() if self.delay else act()


@pytest.fixture
def saboteur(monkeypatch):
    """Hears what the bar hears."""
    saboteur = Saboteur(seed=5, delay=0.05)

    class Overheard(Bar):
        def stage(self, name: str, detail: str = "") -> None:
            super().stage(name, detail)
            saboteur.told(name, detail)

        def note(self, line: str) -> None:
            super().note(line)
            saboteur.notes.append(line)

    monkeypatch.setattr(jobs, "Bar", Overheard)
    return saboteur


def run(*arguments) -> dict:
    outcome = command("run", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


def kill(place: int, number: int = signal.SIGKILL) -> None:
    """One of the actors, in the order of their process numbers."""
    pids = sorted(actors_of(os.getpid()))
    os.kill(pids[place % len(pids)], number)


def assert_nothing_is_left(directory: Path) -> None:
    """Neither temporary files nor processes."""
    assert not list(directory.rglob("*.tmp-*")) and not list(directory.rglob("activations-*"))
    deadline = time.monotonic() + 30
    while actors_of(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not actors_of(os.getpid()), "actors outlive their job"


STAGES = [("capture", 1), ("cluster", 1), ("solve", 1), ("propagate", 2), ("write", 2), ("cluster", 3), ("solve", 3), ("assemble", 1), ("evaluate expanded", 1),
          ("evaluate expanded", 3), ("evaluate dense", 2)]
FEW = [("cluster", 1), ("solve", 2), ("evaluate expanded", 2)]


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("stages", [FEW, pytest.param(STAGES, marks=pytest.mark.slow)], ids=["few", "every stage"])
def test_actors_killed(stages, job, undisturbed, saboteur, tmp_path):
    """One of two actors, each time at another stage: a new one takes its place, and the other one keeps what it has."""
    saboteur.at = {stage: lambda place=place: kill(place) for place, stage in enumerate(stages)}
    result = run(*job, "--actors", 2, "--output-dir", tmp_path / "run")
    assert saboteur.done == sorted(stages, key=saboteur.done.index) and not saboteur.at
    lost = {process for note in saboteur.notes if "was lost" in note for process in re.findall(r"process (\d+)", note.split("was lost")[0])}
    assert len(lost) >= len(stages) - 1  # the last one may die with the job's end
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0]) and result["perplexity"] == undisturbed[1]["perplexity"]
    assert_nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_actors_killed_while_blocks_are_made_apart(job, saboteur, tmp_path):
    """With dense propagation: while the windows flow from actor to actor, in the middle of a block, and while shards are written."""
    undisturbed = run(*job, "--propagation", "dense", "--actors", 1, "--output-dir", tmp_path / "undisturbed")
    stages = [("dense pass", 0), ("expand", 2), ("write", 1), ("expand", 3)]
    saboteur.at = {stage: lambda place=place: kill(place) for place, stage in enumerate(stages)}
    result = run(*job, "--propagation", "dense", "--actors", 2, "--output-dir", tmp_path / "run")
    assert not saboteur.at and len(saboteur.notes) >= 2
    assert shard_hashes(tmp_path / "run") == shard_hashes(tmp_path / "undisturbed") and result["perplexity"] == undisturbed["perplexity"]
    assert_nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_hung_actor_is_replaced(job, undisturbed, saboteur, tmp_path):
    """Stopped in the middle of its work, it neither ends nor answers."""
    saboteur.at = {("cluster", 2): lambda: kill(0, signal.SIGSTOP)}
    result = run(*job, "--output-dir", tmp_path / "run", "--stall-limit", 10)
    [note] = [note for note in saboteur.notes if "was lost" in note]
    assert "has not answered for" in note and "--stall-limit is 10 s; at cluster layer 2 of 3" in note
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0]) and result["perplexity"] == undisturbed[1]["perplexity"]
    assert_nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_an_actor_that_always_dies_ends_the_job_with_a_sentence(job, undisturbed, saboteur, tmp_path):
    def again() -> None:
        saboteur.at[("capture", 2)] = again
        kill(0)

    saboteur.at, saboteur.delay = {("capture", 2): again}, 0
    outcome = command("run", *job, "--output-dir", tmp_path / "run")
    assert outcome.code == 2 and "Error: Actors were lost 3 times at the same place (capture layer 2 of 3; the last: " in outcome.err
    saboteur.at = {}
    run(*job, "--output-dir", tmp_path / "run", "--resume", "require")
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0])


@pytest.mark.usefixtures("one_ray")
def test_a_full_disk(job, undisturbed, saboteur, tmp_path):
    """Full while an actor writes a shard, and again while the driver assembles the model; with room the same command goes on."""
    small, saboteur.delay = tmp_path / "small", 0
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")

    def fill() -> None:
        with contextlib.suppress(OSError), open(small / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass

    try:
        for stage, file in ((("solve", 1), "run/layers/layer_000.safetensors.tmp-"), (("assemble", 1), "run/model.tmp-new/")):
            saboteur.at = {stage: fill}
            outcome = command("run", *job, "--output-dir", small / "run")
            assert outcome.code == 2 and "No space left on device; what is finished stays" in outcome.err and f"{small}/{file}" in outcome.err, outcome.err
            assert len(outcome.err.split("Error: ")[1].splitlines()) == 1
            (small / "ballast").unlink()
        assert run(*job, "--output-dir", small / "run")["layers_resumed"] == LAYERS
        assert shard_hashes(small / "run") == shard_hashes(undisturbed[0])
        assert not list(small.rglob("*.tmp-*"))
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
