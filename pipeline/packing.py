"""Solved experts -> the parts that `packed_experts` reads: the smallest form that a pattern and a number of bits allow."""

import math

import torch
from torch import Tensor

from pipeline.config import Job
from pipeline.packed_experts import LARGEST, Form, bits_of, digits_in_a_word, positions
from pipeline.pattern import Pattern
from pipeline.solver.quantizer import Grid

SHARED = ("scale", "zero")  # parts that all experts of a linear have in common
BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


def forms_of(job: Job, linears: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Form | None]:
    """How a job's experts are stored, by path. linears: weights (R, C), with or without their values."""
    return {path: _form_of(job, *weight.shape, dtype) for path, weight in linears.items()}


def _form_of(job: Job, rows: int, columns: int, dtype: torch.dtype) -> Form | None:
    return choose_form(job.pattern, job.bits if job.quantize else 0, job.group_size, job.num_clusters, rows, columns, dtype)


def choose_form(pattern: Pattern, bits: int, width: int | None, experts: int, rows: int, columns: int, dtype: torch.dtype) -> Form | None:
    """The smallest form; None for experts that are stored as they are. bits: of a code, 0 without quantization. width: columns of
    a quantization group (None: all)."""
    value = bits or 8 * dtype.itemsize
    sizes = {"all": float(value), "mask": 1 + (1 - pattern.fraction) * value}
    n, m = (pattern.n, pattern.m) if pattern.is_n_of_m else (1, 1)
    if pattern.is_n_of_m and m <= LARGEST:
        sizes["pattern"] = 32 / (digits_in_a_word(math.comb(m, n)) * m) + n / m * value
    index = min(sizes, key=sizes.get)
    if index == "all" and not bits:
        return None
    if index != "pattern":
        n, m = 1, 1
    return Form(index, experts, rows, columns, n, m, bits, min(width or columns, columns) if bits else 0)


def bytes_of_form(job: Job, rows: int, columns: int, dtype: torch.dtype) -> int:
    """About what a job's experts of a linear take, packed."""
    form = _form_of(job, rows, columns, dtype)
    if form is None:
        return job.num_clusters * rows * columns * dtype.itemsize
    kept = (1 - job.pattern.fraction) * job.num_clusters * rows * columns  # with a mask
    shapes = form.shapes(int(kept * form.bits / 8) if form.bits else int(kept))
    return sum(math.prod(shape) * (part or dtype).itemsize for shape, part in shapes.values())


def pack(form: Form, weight_RC: Tensor, grid: Grid | None) -> dict[str, Tensor]:
    """One expert's own parts, without the dimension of experts. grid: of its codes. Raises ValueError if the weight is not what
    the form can hold."""
    weight_RC = weight_RC.contiguous()
    kept_RC = _as_integers(weight_RC) != 0  # a negative zero is kept
    what_RC = _codes(weight_RC, grid) if form.bits else weight_RC
    parts = {}
    if form.index == "mask":
        parts["mask"], kept = pack_bits(kept_RC.flatten()), what_RC[kept_RC]
    elif form.index == "pattern":
        columns, parts["words"] = _choices(form, kept_RC)
        kept = what_RC.gather(1, columns)
    else:
        kept = what_RC
    return parts | ({"codes": pack_codes(kept, form.bits)} if form.bits else {"values": kept})


def shared_parts(grid: Grid) -> dict[str, Tensor]:
    return {"scale": grid.scale_RG.float().contiguous(), "zero": grid.zero_RG.to(torch.uint8).contiguous()}


def joined(form: Form, by_expert: list[dict[str, Tensor]], shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """All experts' parts, as a saved model holds them."""
    parts = dict(shared)
    for part in by_expert[0]:
        flat = form.index == "mask" and part != "mask"
        parts[part] = (torch.cat if flat else torch.stack)([own[part] for own in by_expert])
    if form.index == "mask":
        counts = torch.stack([bits_of(own["mask"]).sum() for own in by_expert])
        parts["starts"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return parts


def minimum_bytes(form: Form, kept: list[int], value_bits: int) -> float:
    """What the experts of a linear take at the least: the logarithm of the number of choices of as many weights, and their values.
    kept: weights of each expert. (With a pattern: of the pattern's.)"""
    if form.index == "pattern":
        index = form.experts * form.rows * form.groups * math.log2(form.choices)
    else:
        index = sum(_log2_choices(form.rows * form.columns, count) for count in kept)
    return (index + sum(kept) * value_bits) / 8


def _log2_choices(of: int, count: int) -> float:
    return (math.lgamma(of + 1) - math.lgamma(count + 1) - math.lgamma(of - count + 1)) / math.log(2)


def pack_bits(bits: Tensor) -> Tensor:
    """A row of truth values, eight a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded * BITS.to(bits.device)).sum(-1, dtype=torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Each row of codes (..., n) in ceil(n bits / 8) bytes, the first in the lowest bits."""
    spread = codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device) & 1
    flat = spread.flatten(-2)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded * BITS.to(codes.device)).sum(-1, dtype=torch.uint8)


def _codes(weight_RC: Tensor, grid: Grid) -> Tensor:
    scale_RC, zero_RC = (part_RG.to(weight_RC.device).repeat_interleave(grid.width, 1)[:, :weight_RC.shape[1]] for part_RG in (grid.scale_RG, grid.zero_RG))
    def is_it(codes_RC: Tensor) -> Tensor:
        return ((scale_RC * (codes_RC - zero_RC)).to(weight_RC.dtype) == weight_RC) & (codes_RC >= 0) & (codes_RC <= grid.top)

    codes_RC = (weight_RC.float() / scale_RC).round().add(zero_RC)
    for step in (-1, 1):  # in bfloat16, 8 bits of a weight can be rounded past the middle between two codes
        if bool(is_it(codes_RC).all()):
            break
        codes_RC = torch.where(is_it(codes_RC + step), codes_RC + step, codes_RC)
    if not bool(is_it(codes_RC).all()):
        raise ValueError("a weight is not on its grid")
    return codes_RC.to(torch.uint8)


def _choices(form: Form, kept_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Kept columns (R, kept), filled up where fewer than N weights of a group are kept, and the words that tell them."""
    kept_RGM = kept_RC.unflatten(1, (form.groups, form.m))
    missing_RG = form.n - kept_RGM.sum(-1, dtype=torch.int32)
    if bool((missing_RG < 0).any()):
        raise ValueError(f"more than {form.n} of {form.m} weights are kept")
    bits_RG = torch.zeros_like(missing_RG)
    for place in range(form.m):
        chosen_RG = kept_RGM[..., place] | (missing_RG > 0)
        missing_RG -= (chosen_RG & ~kept_RGM[..., place]).int()
        bits_RG |= chosen_RG.int() << place
    table = positions(form.n, form.m)
    rank = torch.zeros(1 << form.m, dtype=torch.int64)
    rank[(1 << table).sum(1)] = torch.arange(len(table))
    digits_RG = rank.to(kept_RC.device)[bits_RG]
    columns = (table.to(kept_RC.device)[digits_RG] + torch.arange(0, form.columns, form.m, device=kept_RC.device)[None, :, None]).flatten(1)
    digits = torch.nn.functional.pad(digits_RG, (0, -form.groups % form.digits)).unflatten(1, (-1, form.digits))
    powers = torch.tensor([form.choices**place for place in range(form.digits)], device=kept_RC.device)
    return columns, (digits * powers).sum(-1).to(torch.int32)


def _as_integers(weight: Tensor) -> Tensor:
    return weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize])
