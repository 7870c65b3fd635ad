"""How fast a device does what a job consists of: measured in a few seconds, or built in for an H100.

Shapes: N tokens, D dimensions, E clusters.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pipeline.layout import WRITERS, Layout, described, digest_of
from pipeline.routing import Entry, Tournament, play

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrix products
TOKENS, DIMENSIONS, CLUSTERS, STEPS = {"cpu": 8192, "cuda": 262144}, 128, 16, 10  # of the KMeans run
FILE = 1 << 26  # bytes written, hashed and copied


@dataclass(frozen=True)
class Rates:
    """`product32`, `product16`: operations/s of large matrix products in float32 and in 16 bits. copy: bytes/s that a copy on the device
    reads and writes. kmeans: seconds for each token, dimension and step of KMeans with 16 clusters, on all of an actor's threads.
    from_device: bytes/s into host memory that is new, as results come. to_device: bytes/s. file: bytes/s written and flushed.
    hash: bytes/s. store: bytes/s into Ray's object store. network: bytes/s between nodes. step: seconds that a GPU takes for
    a small step, whatever its size; 0 on a CPU. name: whose rates these are."""

    product32: float
    product16: float
    copy: float
    kmeans: float
    from_device: float
    to_device: float
    file: float
    hash: float
    store: float
    network: float
    step: float
    name: str

    @classmethod
    def slowest(cls, found: "list[Rates]") -> "Rates":
        """Of several devices: everybody waits for the last one."""
        worst = {field.name: (max if field.name in ("kmeans", "step") else min)(getattr(one, field.name) for one in found)
                 for field in fields(cls) if field.name != "name"}
        return cls(**worst, name=", ".join(sorted({one.name for one in found})))


# Products, KMeans and steps from tests/benchmarks/results/gpu.json; the rest from virtual machines with this card. What leaves a GPU goes
# through pinned memory: 50 GB/s once it is pinned, 1.2 GB/s into memory that is new; whole jobs (several-*.json) reach about 5. The network is 10 Gbit/s.
NETWORK = 1.25e9
H100 = Rates(product32=5.0e13, product16=7.8e14, copy=2.9e12, kmeans=4.0e-12, from_device=5.0e9, to_device=7.0e9, file=3.5e9, hash=8.0e9,
             store=6.0e9, network=NETWORK, step=1.5e-4, name="NVIDIA H100 80GB HBM3, built in")


def measure(device: torch.device, folder: Path, name: str) -> Rates:
    """Takes a few seconds. folder: where shards would go. The object store and the network are for Ray to measure; here they are
    taken to be as fast as new host memory, and 10 Gbit/s."""
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).unbind()
    product32 = 2 * side**3 / _seconds(lambda: left @ right, device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = left.to(half), right.to(half)
    product16 = 2 * side**3 / _seconds(lambda: left @ right, device)
    source = torch.zeros(FILE // 4 * (16 if device.type == "cuda" else 1), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    piece = source[:FILE // 4]
    if device.type == "cuda":
        host = torch.empty(FILE // 4)
        from_device, to_device = FILE / _seconds(lambda: piece.cpu(), device), FILE / _seconds(lambda: piece.copy_(host), device)
    else:
        from_device = to_device = FILE / _seconds(lambda: piece.clone(), device)
    step = H100.step if device.type == "cuda" else 0.0
    return Rates(product32, product16, copy, _kmeans(device, step), from_device, to_device, *_file(folder), from_device, NETWORK, step, name)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The best of several, after one that does not count."""
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if number else best
    return best


def _kmeans(device: torch.device, step: float) -> float:
    tokens = TOKENS[device.type]
    generator = torch.Generator().manual_seed(0)
    tokens_ND = torch.randn(tokens, DIMENSIONS, generator=generator).to(device)
    runs = torch.get_num_threads() if device.type == "cpu" else 1
    entries = [Entry(start_ED=tokens_ND[:CLUSTERS].cpu().clone(), steps=STEPS)] * runs
    tournament = Tournament(tokens, CLUSTERS, 1, 0, device.type)
    seconds = _seconds(lambda: play(tournament, entries, tokens_ND, CLUSTERS), device, 2) / runs
    return max(seconds / STEPS - step, 0.1 * seconds / STEPS) / (tokens * DIMENSIONS)


def _file(folder: Path) -> tuple[float, float]:
    """Bytes/s written and flushed, and hashed."""
    data = torch.randint(256, (WRITERS, FILE // WRITERS), dtype=torch.uint8)
    tensors = {str(number): part for number, part in enumerate(data)}
    layout = Layout(described(tensors), {})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".measured-") as inside:
        file = Path(inside) / "file"
        start = time.perf_counter()
        with open(file, "wb") as opened:
            opened.write(layout.header + data.numpy().tobytes())
            opened.flush()
            os.fsync(opened.fileno())
        written = time.perf_counter() - start
        start = time.perf_counter()
        digest_of(file)
        return FILE / written, FILE / (time.perf_counter() - start)
