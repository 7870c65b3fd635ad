"""Solve and factor beside the textbook run expert by expert.

The floor is the unavoidable operations at the rate of a large float32 matrix product: for each expert C^3 / 3 (Cholesky) +
C^3 / 3 (triangular inverse) + R C^2 (carrying errors to the right).
"""

import pytest
import torch

from pipeline.pattern import Pattern
from pipeline.solver import find_grid, inverse_factor, solve
from tests import textbook
from tests.benchmarks.measure import DEVICE, ON_GPU, product_rate, seconds

EXPERTS = 16
SOLVES = {
    False: [(1024, 1024, "0.5", None), (1024, 1024, "2:4", 4)],
    True: [(8192, 2048, "0.5", None), (8192, 2048, "2:4", None), (4096, 11008, "2:4", 4)],
}[ON_GPU]
FACTORS = {False: [1024], True: [2048, 11008]}[ON_GPU]


def random_hessians(columns: int, generator: torch.Generator) -> torch.Tensor:
    hessian_ECC = torch.empty(EXPERTS, columns, columns, device=DEVICE)
    for hessian_CC in hessian_ECC:
        tokens_NC = torch.randn(2 * columns, columns, generator=generator, device=DEVICE) * torch.rand(columns, generator=generator, device=DEVICE)
        torch.mm(tokens_NC.T, tokens_NC / len(tokens_NC), out=hessian_CC)
    return hessian_ECC


@pytest.mark.parametrize("rows, columns, sparsity, bits", SOLVES)
def test_solve(rows, columns, sparsity, bits, benchmark, record):
    rate = product_rate()
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight_RC = torch.randn(rows, columns, generator=generator, device=DEVICE)
    hessian_ECC = random_hessians(columns, generator)
    pattern = Pattern.parse(sparsity)

    def ours() -> None:
        grid = find_grid(weight_RC, bits, None, False, False) if bits else None
        solve(weight_RC, inverse_factor(hessian_ECC), pattern, [rows], grid)

    here = benchmark.pedantic(lambda: seconds(ours), rounds=1)
    some = hessian_ECC[:1 if ON_GPU else 2]
    options = dict(fraction=0 if pattern.is_n_of_m else pattern.fraction, n=pattern.n, m=pattern.m, bits=bits, dtype=torch.float32)
    plain = seconds(lambda: [textbook.sparsegpt(weight_RC, hessian_CC, **options) for hessian_CC in some], 1, warm=False) * EXPERTS / len(some)
    floor = EXPERTS * (2 / 3 * columns**3 + rows * columns**2) / rate
    record(f"solve {EXPERTS} x {rows} x {columns}, {sparsity}{f' + {bits} bits' if bits else ''}", here, floor, plain)


@pytest.mark.parametrize("columns", FACTORS)
def test_factor(columns, benchmark, record):
    rate = product_rate()
    hessian_ECC = random_hessians(columns, torch.Generator(DEVICE).manual_seed(0))
    here = benchmark.pedantic(lambda: seconds(lambda: inverse_factor(hessian_ECC)), rounds=1)

    def three(hessian_CC: torch.Tensor) -> None:
        torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC)), upper=True)

    some = hessian_ECC[:2]
    plain = seconds(lambda: [three(hessian_CC) for hessian_CC in some], 1) * EXPERTS / len(some)
    record(f"factor {EXPERTS} x {columns} x {columns}", here, EXPERTS * 2 / 3 * columns**3 / rate, plain)
