"""The solver beside the textbook loop run expert by expert, and beside its floor, in one run on one device.

    make bench

The floor of a solve is its unavoidable operations at the rate of a large float32 matrix product measured in the same run: per
expert C^3 / 3 (Cholesky) + C^3 / 3 (triangular inverse) + R C^2 (carrying errors to the right).
"""

import time

import pytest
import torch

from pipeline.pattern import Pattern
from pipeline.solver import find_grid, inverse_factor, solve
from tests import textbook

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "cpu": [(16, 1024, 1024, "0.5", None), (16, 1024, 1024, "2:4", 4)],
    "cuda": [(16, 8192, 2048, "0.5", None), (16, 4096, 11008, "2:4", 4), (16, 8192, 2048, "2:4", None)],
}[DEVICE]


def seconds(work, repeats: int) -> float:
    """The best of several runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate() -> float:
    """Operations a second of a large float32 matrix product."""
    size = 8192 if DEVICE == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=DEVICE).unbind()
    return 2 * size**3 / seconds(lambda: left @ right, 5)


@pytest.mark.parametrize("experts, rows, columns, sparsity, bits", CASES)
def test_solve(experts, rows, columns, sparsity, bits, benchmark, record):
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight_RC = torch.randn(rows, columns, generator=generator, device=DEVICE)
    hessians = torch.empty(experts, columns, columns, device=DEVICE)
    for expert in range(experts):
        tokens_NC = torch.randn(2 * columns, columns, generator=generator, device=DEVICE) * torch.rand(columns, generator=generator, device=DEVICE)
        hessians[expert] = tokens_NC.T @ tokens_NC / len(tokens_NC)
    pattern = Pattern.parse(sparsity)
    batch = experts if columns <= 4096 else 4  # as memory allows

    def ours() -> None:
        grid = find_grid(weight_RC, bits, None, False, False) if bits else None
        for first in range(0, experts, batch):
            solve(weight_RC, inverse_factor(hessians[first:first + batch]), pattern, [rows], grid)

    benchmark.pedantic(lambda: seconds(ours, 1), rounds=3, warmup_rounds=1)
    mine = benchmark.stats.stats.min
    factor = seconds(lambda: [inverse_factor(hessians[first:first + batch]) for first in range(0, experts, batch)], 2)
    measured = 1 if DEVICE == "cuda" else 2
    options = dict(fraction=0 if pattern.is_n_of_m else pattern.fraction, n=pattern.n, m=pattern.m, bits=bits, dtype=torch.float32)
    theirs = seconds(lambda: [textbook.sparsegpt(weight_RC, hessians[expert], **options) for expert in range(measured)], 1) * experts / measured
    floor = experts * (2 / 3 * columns**3 + rows * columns**2) / matmul_rate()
    record(f"solve {experts} x {rows} x {columns}, {sparsity}{f' + {bits} bits' if bits else ''}", theirs, mine, floor, f"of it factors {factor:.3f} s")
