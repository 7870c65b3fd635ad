"""Kernels of packed experts against plain unpacking, in Triton's interpreter: no GPU is needed. On a GPU the compiled ones are tested."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("triton", reason="the triton package is not here")

CASES = [
    dict(sparsity="0.5"), dict(sparsity="0.8", columns=96, bits=2), dict(sparsity="0.7", bits=4, width=32), dict(sparsity="0.5", bits=8, columns=64),
    dict(sparsity="2:4"), dict(sparsity="2:4", bits=4), dict(sparsity="2:4", bits=4, width=16, columns=144), dict(sparsity="1:8", bits=2, width=24),
    dict(sparsity="4:8"), dict(sparsity="5:12", columns=96, bits=8),
]

SCRIPT = """
import torch
from pipeline import expert_kernels as kernels
from pipeline.packed_experts import check
from tests.packed import random_experts

device = "cuda" if torch.cuda.is_available() else "cpu"
for case in {cases!r}:
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and "bits" in case and device == "cpu":
            continue  # the interpreter cuts float32 off where a GPU rounds
        form, parts, weight_ERC = random_experts(2, 9, case.get("columns", 192), case["sparsity"], case.get("bits", 0), case.get("width"), dtype)
        parts = {{name: part.to(device) for name, part in parts.items()}}
        check(form, parts, "x")
        assert kernels.can_unpack(form), case
        starts, first = (kernels.row_starts(form, parts), kernels.first_stored(form, parts)) if form.index == "mask" else (None, None)
        for expert in range(2):
            found = kernels.unpack_expert(form, parts, starts, first, expert, dtype)
            assert torch.equal(found.cpu(), weight_ERC[expert]), (case, dtype, expert)
        if kernels.can_multiply(form):
            tokens_NC = torch.randn(3, form.columns, dtype=dtype).to(device)
            experts_N = torch.tensor([1, 0, 1], device=device)
            found = kernels.multiply(form, parts, starts, first, tokens_NC, experts_N).cpu().double()
            true = torch.einsum("nc,nrc->nr", tokens_NC.cpu().double(), weight_ERC.double()[experts_N.cpu()])
            bound = 1e-5 if dtype == torch.float32 else 1e-2
            assert ((found - true).norm() / true.norm()) < bound, (case, dtype, float((found - true).norm() / true.norm()))
        else:
            assert form.index == "pattern" and case["sparsity"] != "2:4", case
print("the same")
"""


def test_kernels_equal_plain_unpacking():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    result = subprocess.run([sys.executable, "-c", SCRIPT.format(cases=CASES)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "the same" in result.stdout, result.stderr[-3000:]
