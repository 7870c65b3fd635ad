"""Sums of x x^T over tokens: what Hessians and principal components are made of.

Shapes: N tokens, C columns (in features).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.solver.products import strips

# Fixed, so that a sum does not depend on how its tokens were brought together; short, since tensor cores cut the last bit
# of a sum whenever they add to it (7e-5 of a sum over 16384 tokens on an H100).
TOKENS_PER_PRODUCT = 4096


def chunks(tokens_NC: Tensor) -> Sequence[Tensor]:
    return tokens_NC.split(TOKENS_PER_PRODUCT)


def gram(tokens_NC: Tensor, centre_C: Tensor | None = None) -> Tensor:
    """The float32 sum (C, C) of (x - centre) (x - centre)^T over the tokens, in their order.

    On a GPU 16-bit tokens go through the tensor cores as they are: a product of two of them is exact in float32, and the
    sums are float32 too. There the centre is taken off the sum, not off the tokens.
    """
    columns = tokens_NC.shape[1]
    total_CC = torch.zeros(columns, columns, device=tokens_NC.device)
    direct = takes_16_bits(tokens_NC)
    for chunk_NC in chunks(tokens_NC):
        if not direct:
            chunk_NC = chunk_NC.float() if centre_C is None else chunk_NC.float() - centre_C
        for part in strips(columns):  # the sum is symmetric: its upper triangle is enough
            above_CC = total_CC[:part.stop, part]
            if direct:
                above_CC += torch.mm(chunk_NC[:, :part.stop].T, chunk_NC[:, part], out_dtype=torch.float32)
            else:
                above_CC.addmm_(chunk_NC[:, :part.stop].T, chunk_NC[:, part])
    for part in strips(columns):
        total_CC[part, :part.start] = total_CC[:part.start, part].T
    if direct and centre_C is not None:
        total_CC.addr_(centre_C, centre_C, alpha=-len(tokens_NC))
    return total_CC


def takes_16_bits(tokens_NC: Tensor) -> bool:
    """Can a product of these tokens be summed in float32 without copies in float32? (torch 2.8 or later)"""
    has_out_dtype = "dtype" in torch.ops.aten.mm.overloads()
    return tokens_NC.is_cuda and tokens_NC.dtype in (torch.bfloat16, torch.float16) and has_out_dtype


def hessian(tokens_NC: Tensor) -> Tensor:
    """2/n X^T X (C, C) in float32: the sum divided once, since running means would differ between layouts."""
    return gram(tokens_NC).mul_(2 / max(len(tokens_NC), 1))
