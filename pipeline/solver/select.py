"""The value at one place of many sorted lists, without sorting: an exact radix selection on the GPU, in Triton.

The bits of floats that are not negative sort as the floats do. Four passes count, byte by byte from the top, the values that
share the bytes found so far.
Shapes: E experts, N values of an expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # values of a program


@triton.jit
def _count_kernel(bits, prefix, counts, values, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """counts[e, b]: the values of expert e whose bits above SHIFT + 8 are its prefix and whose next byte is b."""
    expert = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(bits + expert * values + place, mask=place < values, other=0)
    matches = (place < values) & (((found >> SHIFT) >> 8) == tl.load(prefix + expert))
    bins = tl.arange(0, 512)
    # Whatever does not match is counted in a bin that is thrown away.
    count = tl.histogram(tl.where(matches, (found >> SHIFT) & 255, 256), 512)
    tl.atomic_add(counts + expert * 256 + bins, count, mask=(bins < 256) & (count > 0))


def radix_select(values_EN: Tensor, index: int) -> Tensor:
    """values_EN.sort(dim=1).values[:, index] for float32 values that are not negative."""
    experts, values = values_EN.shape
    bits_EN = values_EN.contiguous().view(torch.int32)
    prefix_E = torch.zeros(experts, dtype=torch.int32, device=values_EN.device)
    rank_E = torch.full((experts, 1), index, device=values_EN.device)
    for shift in (24, 16, 8, 0):
        counts_EB = torch.zeros(experts, 256, dtype=torch.int32, device=values_EN.device)
        _count_kernel[(triton.cdiv(values, CHUNK), experts)](bits_EN, prefix_E, counts_EB, values, SHIFT=shift, CHUNK=CHUNK)
        ends_EB = counts_EB.cumsum(1)
        byte_E = (ends_EB <= rank_E).sum(1, keepdim=True)
        rank_E = rank_E - (ends_EB.gather(1, byte_E) - counts_EB.gather(1, byte_E))
        prefix_E = (prefix_E << 8) | byte_E[:, 0].int()
    return prefix_E.view(torch.float32)
