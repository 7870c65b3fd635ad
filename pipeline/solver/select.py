"""The value at one place of many sorted lists, without sorting: an exact selection digit by digit on the GPU, in Triton.

The bits of floats that are not negative sort as the floats do. A pass counts, for each of the 16 values that the next digit
can have, the values below; the digit follows from where the place lies among the counts. Comparisons and sums, since a
histogram of digits that are nearly all the same would queue at one counter.
Shapes: E experts, N values of an expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DIGIT = 4  # bits
DIGITS = 32 // DIGIT
CHUNK, PART = 16384, 512  # values of a program, and of one step of it


@triton.jit
def _count_kernel(bits, counts, values, index, DONE: tl.constexpr, DIGIT: tl.constexpr, DIGITS: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr):
    """counts[e, DONE, d]: the values of expert e that are below its first DONE digits followed by d."""
    expert = tl.program_id(1).to(tl.int64)
    bins = tl.arange(0, 1 << DIGIT)
    counts += expert * DIGITS * (1 << DIGIT) + bins
    prefix = 0
    for done in tl.static_range(DONE):
        below = tl.load(counts + done * (1 << DIGIT))
        prefix = (prefix << DIGIT) + tl.sum((below <= index).to(tl.int32), axis=0) - 1
    limit = (prefix << DIGIT) + bins
    first = tl.program_id(0) * CHUNK
    smaller = tl.zeros((1 << DIGIT, PART), tl.int32)
    for start in range(first, first + CHUNK, PART):
        place = start + tl.arange(0, PART)
        found = tl.load(bits + expert * values + place, mask=place < values, other=0x7fffffff) >> ((DIGITS - 1 - DONE) * DIGIT)
        smaller += ((found[None, :] < limit[:, None]) & (place < values)[None, :]).to(tl.int32)
    tl.atomic_add(counts + DONE * (1 << DIGIT), tl.sum(smaller, axis=1))


def select(values_EN: Tensor, index: int) -> Tensor:
    """values_EN.sort(dim=1).values[:, index] for float32 values that are not negative."""
    experts, values = values_EN.shape
    bits_EN = values_EN.contiguous().view(torch.int32)
    counts_EPD = torch.zeros(experts, DIGITS, 1 << DIGIT, dtype=torch.int32, device=values_EN.device)
    for done in range(DIGITS):
        _count_kernel[(triton.cdiv(values, CHUNK), experts)](bits_EN, counts_EPD, values, index, DONE=done, DIGIT=DIGIT, DIGITS=DIGITS, CHUNK=CHUNK, PART=PART)
    digits_EP = (counts_EPD <= index).sum(-1) - 1
    weights_P = 1 << (DIGIT * torch.arange(DIGITS - 1, -1, -1, device=values_EN.device))
    return (digits_EP * weights_P).sum(1).int().view(torch.float32)
