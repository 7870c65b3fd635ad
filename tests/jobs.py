"""A small job on a tiny model, for the tests that run it many times over: kills, actors, clusters."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np

from tests.models import save_tiny, token_windows

LAYERS = 3


def make_inputs(directory: Path) -> list[str]:
    """The options of the small job, without --output-dir."""
    save_tiny(directory / "model")
    np.save(directory / "calibration.npy", token_windows(160, 64, seed=1).numpy())
    np.save(directory / "evaluation.npy", token_windows(80, 64, seed=2).numpy())
    return ["--model", directory / "model", "--dataset", directory / "calibration.npy", "--eval-dataset", directory / "evaluation.npy",
            "--num-clusters", 3, "--pca-reduction-factor", 4, "--kmeans-restarts", 2, "--threads", 1]


def shard_hashes(run: Path) -> list[str]:
    """Of every layer and of the saved model's weights."""
    files = sorted(run.glob("layers/*.safetensors")) + sorted(run.glob("model/*.safetensors"))
    assert len(files) == 2 * LAYERS + 1
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, by process id."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # gone meanwhile
    found: dict[int, str] = {}
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown and child not in found}
        found |= {child: titles[child] for child in grown}
    return found


def actors_of(driver: int) -> list[int]:
    return [pid for pid, title in descendants(driver).items() if title.startswith("ray::LayerShard")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


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
