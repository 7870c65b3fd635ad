"""Sums of x x^T over tokens: what Hessians and principal components are made of.

A sum must not depend on who holds which tokens. So products are taken over pieces of a fixed length; and where the tokens lie
with several actors, the window groups' sums are added along a fixed binary tree, of which everybody makes the nodes that
lie within its own groups.

Shapes: N tokens, C columns (in features).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.solver.products import strips

# Fixed, so that a sum does not depend on how its tokens were brought together; short, since tensor cores cut the last bit
# of a sum whenever they add to it (7e-5 of a sum over 16384 tokens on an H100).
TOKENS_PER_PRODUCT = 4096

Tokens = Tensor | Sequence[Tensor]  # (N, C), or parts of it in their order
Node = tuple[int, int]  # of the tree: from one window group up to, not including, another


def chunks(tokens: Tokens, device: torch.device | None = None) -> Iterator[Tensor]:
    """The tokens in pieces of a fixed length, moved to `device`, whatever parts they come in and wherever those lie."""
    pieces, missing = [], TOKENS_PER_PRODUCT
    for part_NC in [tokens] if isinstance(tokens, Tensor) else tokens:
        while len(part_NC):
            pieces.append(part_NC[:missing].to(device or part_NC.device, non_blocking=True))
            missing -= len(pieces[-1])
            part_NC = part_NC[len(pieces[-1]):]
            if not missing:
                yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                pieces, missing = [], TOKENS_PER_PRODUCT
    if pieces:
        yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def gram(tokens: Tokens, centre_C: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """The float32 sum (C, C) of (x - centre) (x - centre)^T over the tokens, in their order, on `device` (the tokens' own
    unless given).

    On a GPU 16-bit tokens go through the tensor cores as they are: a product of two of them is exact in float32, and the
    sums are float32 too. There the centre is taken off the sum, not off the tokens.
    """
    first_NC = tokens if isinstance(tokens, Tensor) else tokens[0]
    columns, device = first_NC.shape[1], device or first_NC.device
    total_CC = torch.zeros(columns, columns, device=device)
    direct, count = takes_16_bits(first_NC.dtype, device), 0
    for chunk_NC in chunks(tokens, device):
        count += len(chunk_NC)
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
        total_CC.addr_(centre_C, centre_C, alpha=-count)
    return total_CC


def takes_16_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Can a product of these tokens be summed in float32 without copies in float32? (torch 2.8 or later)"""
    has_out_dtype = "dtype" in torch.ops.aten.mm.overloads()
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and has_out_dtype


def hessian(tokens: Tokens, device: torch.device | None = None) -> Tensor:
    """2/n X^T X (C, C) in float32: the sum divided once, since running means would differ between layouts."""
    count = len(tokens) if isinstance(tokens, Tensor) else sum(map(len, tokens))
    return gram(tokens, device=device).mul_(2 / max(count, 1))


def partial_sums(leaf: Callable[[int], Tensor], own: range, groups: int) -> dict[Node, Tensor]:
    """The sums of those nodes of the tree over all window groups that lie within one's own groups, the largest ones only.
    leaf: the sum of one group, as a tensor of its own."""

    def whole(first: int, last: int) -> Tensor:
        if last - first == 1:
            return leaf(first)
        middle = _middle(first, last)
        return whole(first, middle).add_(whole(middle, last))

    def within(first: int, last: int) -> dict[Node, Tensor]:
        if own.start <= first and last <= own.stop:
            return {(first, last): whole(first, last)}
        if last <= own.start or own.stop <= first or last - first == 1:
            return {}
        middle = _middle(first, last)
        return within(first, middle) | within(middle, last)

    return within(0, groups)


def total(parts: dict[Node, Any], first: int, last: int, take: Callable[[Any], Tensor] = lambda part: part) -> Tensor:
    """The sum over a node from `partial_sums` of everybody, as they were sent. take: makes a tensor of one, when its turn has come;
    they are added up in place."""
    if (first, last) in parts:
        return take(parts[first, last])
    middle = _middle(first, last)
    return total(parts, first, middle, take).add_(total(parts, middle, last, take))


def _middle(first: int, last: int) -> int:
    return first + (1 << ((last - first - 1).bit_length() - 1))
