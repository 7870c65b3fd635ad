"""Random experts that a pattern and a grid allow, packed; and packed experts read by the book."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.packed_experts import Form
from pipeline.packing import choose_form, joined, pack, shared_parts
from pipeline.pattern import Pattern
from pipeline.solver.quantizer import find_grid

DEMO_SHAPES = {"mlp.dense_h_to_4h": (1024, 256), "mlp.dense_4h_to_h": (256, 1024)}  # of the embedded model


def random_experts(experts: int, rows: int, columns: int, sparsity: str, bits: int = 0, width: int | None = None, dtype: torch.dtype = torch.float32,
                   seed: int = 0) -> tuple[Form | None, dict[str, Tensor], Tensor]:
    """Form, parts and weights (E, R, C); where nothing is gained by packing (form None) the weights are the one part."""
    generator, pattern = torch.Generator().manual_seed(seed), Pattern.parse(sparsity)
    dense_RC = torch.randn(rows, columns, generator=generator)
    grid = find_grid(dense_RC, bits, width, False, False) if bits else None
    weights = []
    for _ in range(experts):
        weight_RC = dense_RC + 0.3 * torch.randn(rows, columns, generator=generator)
        if pattern.is_n_of_m:
            chosen = torch.rand(rows, columns // pattern.m, pattern.m, generator=generator).topk(pattern.n).indices
            kept_RC = torch.zeros(rows, columns // pattern.m, pattern.m).scatter_(-1, chosen, 1).view(rows, columns).bool()
        else:
            kept_RC = torch.rand(rows, columns, generator=generator) >= pattern.fraction
        if grid is not None:
            weight_RC = torch.stack([grid.round_column(weight_RC[None, :, column], column)[0] for column in range(columns)], 1)
        weights.append(weight_RC.masked_fill(~kept_RC, 0).to(dtype))
    form = choose_form(pattern, bits, width, experts, rows, columns, dtype)
    if form is None:
        return form, {"weight": torch.stack(weights)}, torch.stack(weights)
    parts = joined(form, [pack(form, weight_RC, grid) for weight_RC in weights], shared_parts(grid) if grid else {})
    return form, parts, torch.stack(weights)


def read_plainly(form: dict, parts: dict[str, np.ndarray], expert: int) -> np.ndarray:
    """One expert's weight (R, C) by the book of `packed_experts`, in numpy, bit by bit: what the README shows, for every form."""
    rows, columns, n, m, bits, width = (form[name] for name in ("rows", "columns", "n", "m", "bits", "width"))
    in_order = lambda packed: np.unpackbits(np.atleast_1d(packed), axis=-1, bitorder="little")  # noqa: E731
    if form["index"] == "mask":
        kept = in_order(parts["mask"][expert])[:rows * columns].reshape(rows, columns).astype(bool)
        starts = parts["starts"]
        if bits:
            begin = sum(math.ceil((starts[one + 1] - starts[one]) * bits / 8) for one in range(expert))
            stream = in_order(parts["codes"][begin:])[:(starts[expert + 1] - starts[expert]) * bits]
        else:
            values = parts["values"][starts[expert]:starts[expert + 1]]
    else:
        kept = np.zeros((rows, columns), bool)
        choices, digits = list(itertools.combinations(range(m), n)), 0
        while len(choices) ** (digits + 1) <= 2**32 and len(choices) > 1:
            digits += 1
        for row in range(rows):
            for group in range(columns // m):
                digit = 0 if len(choices) == 1 else int(parts["words"][expert, row, group // digits]) % 2**32 // len(choices) ** (group % digits) % len(choices)
                for column in choices[digit]:
                    kept[row, group * m + column] = True
        if bits:
            stream = np.concatenate([in_order(line)[:columns // m * n * bits] for line in parts["codes"][expert]])
        else:
            values = parts["values"][expert].reshape(-1)
    weight = np.zeros((rows, columns), np.float32 if bits else values.dtype)
    if bits:
        codes = stream.reshape(-1, bits) @ (1 << np.arange(bits))
        span = np.nonzero(kept)[0], np.nonzero(kept)[1] // width
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales
            values = parts["scale"][span] * (codes.astype(np.float32) - parts["zero"][span].astype(np.float32))
    weight[kept] = values
    return weight


def shard_experts(file: Path, path: str, sparsity: str, bits: int = 0, width: int | None = None) -> np.ndarray:
    """All experts (E, R, C) of a linear in a layer's file."""
    found = {name.removeprefix(f"{path}."): tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in load_file(file).items() if name.startswith(f"{path}.") and name.count(".") > path.count(".")}
    experts = 1 + max(int(name.split(".")[0]) for name in found if name[0].isdigit())
    rows, columns = DEMO_SHAPES[path]
    form = choose_form(Pattern.parse(sparsity), bits, width, 1, rows, columns, torch.float32).to_dict()
    weights = []
    for expert in range(experts):
        own = {part: found[f"{expert}.{part}"].numpy()[None] for part in ("mask", "words") if f"{expert}.{part}" in found}
        stored = next(found[f"{expert}.{part}"].numpy() for part in ("values", "codes") if f"{expert}.{part}" in found)
        own["codes" if bits else "values"] = stored if form["index"] == "mask" else stored[None]
        if form["index"] == "mask":
            own["starts"] = np.array([0, int(np.unpackbits(own["mask"]).sum())])
        weights.append(read_plainly(form, own | {part: found[part].numpy() for part in ("scale", "zero") if part in found}, 0))
    return np.stack(weights)
