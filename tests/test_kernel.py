"""The fused kernels against their plain twins, in Triton's interpreter: no GPU is needed. On a GPU the compiled kernels are tested."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("triton", reason="the triton package is not here")

CASES = [
    dict(sparsity="0.5", columns=128), dict(sparsity="0.8", columns=36), dict(sparsity="2:4"), dict(sparsity="1:8"), dict(sparsity="0", bits=4),
    dict(sparsity="0.5", bits=3, group_size=16), dict(sparsity="2:4", bits=4, symmetric=True), dict(sparsity="5:12", columns=36),
]

SCRIPT = """
import sys, torch
from pipeline.pattern import Pattern
from pipeline.solver import find_grid, inverse_factor
from pipeline.solver import kernel
from pipeline.solver.mask import thresholds
from pipeline.solver.select import select
from pipeline.solver.solve import BLOCK, _scores, _solve_columns

device = "cuda" if torch.cuda.is_available() else "cpu"
for number, case in enumerate({cases!r}):
    generator = torch.Generator().manual_seed(number)
    columns, rows, experts = case.get("columns", 32), 37, 2
    pattern = Pattern.parse(case["sparsity"])
    weight_RC = torch.randn(rows, columns, generator=generator)
    tokens = torch.randn(experts, 300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    upper_ECC = inverse_factor((tokens.mT @ tokens / 300).to(device)).upper_ECC
    grid = find_grid(weight_RC.to(device), case["bits"], case.get("group_size"), case.get("symmetric", False), False) if "bits" in case else None
    block = BLOCK - BLOCK % pattern.m if pattern.is_n_of_m else BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        plain = weight_RC.T.to(device).expand(experts, -1, -1).clone(memory_format=torch.contiguous_format)
        fused = plain.clone()
        part = slice(start, stop)
        upper = upper_ECC[:, part, part]
        threshold = None
        if not pattern.is_n_of_m:
            scores = _scores(plain[:, part], upper.diagonal(dim1=1, dim2=2))
            threshold = thresholds(scores, pattern.fraction, [rows])
        expected, errors = torch.empty(2, experts, stop - start, rows, device=device).unbind()
        _solve_columns(plain[:, part], upper, expected, threshold, pattern, grid, start)
        kernel.solve_block(fused[:, part], upper, errors, threshold, pattern, grid, start)
        same = ((plain == 0) == (fused == 0)).all(dim=1)  # rows without a near tie
        assert same.float().mean() > 0.95, case
        for one, other in ((plain, fused), (expected, errors)):
            difference = (one - other).abs().amax(dim=1)[same] / one.abs().max()
            close = difference < 1e-4
            # A grid turns a difference in the last bit into a step now and then.
            assert close.float().mean() > (0.9 if grid else 0.999), (case, float(difference.max()))
values = torch.rand(3, 5000, generator=torch.Generator().manual_seed(13)) ** 8
values[1, :2000] = 0.25
values[2, :4000] = 0
for index in (0, 1, 1500, 2500, 4999):
    assert torch.equal(select(values.to(device), index).cpu(), values.sort(dim=1).values[:, index]), index
print("equal")
"""


def test_kernels_equal_their_plain_twins():
    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    finished = subprocess.run([sys.executable, "-c", SCRIPT.format(cases=CASES)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.stdout.strip() == "equal", finished.stderr[-3000:]
