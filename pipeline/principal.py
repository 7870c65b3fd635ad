"""Principal components from the Gram matrix: the leading ones alone. In steps, since the tokens may lie with several actors.

    sums    = token_sums(tokens, sizes, device)                          everybody, over own window groups
    mean    = mean_of([sums, ...], count)
    parts   = scatter_parts(tokens, sizes, first, groups, mean, device)  everybody
    axes    = leading_axes(parts of all, groups, count, components, seed)
    project(tokens, sizes, mean, axes, device)                           everybody

Shapes: N tokens, G window groups, C columns (in features), D components, Q vectors that are iterated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.gram import Node, chunks, gram, partial_sums, total

WHOLE = 2048  # columns up to which a full decomposition is the fastest
MORE = 1.25  # vectors iterated for each component wanted: the last ones converge with the gap to the first one left out
CHANGE, MOST = 1e-3, 30  # stop when the variance that the vectors hold grows by less than this share, or after so many rounds


def token_sums(tokens_NC: Tensor, sizes: Sequence[int], device: torch.device) -> Tensor:
    """The sum over each window group's tokens (G, C), float64. sizes: tokens of each group."""
    empty_GC = torch.zeros(0, tokens_NC.shape[1], dtype=torch.float64, device=device)
    sums = [sum(chunk_NC.sum(0, dtype=torch.float32).double() for chunk_NC in chunks(group_NC, device)) for group_NC in tokens_NC.split(list(sizes))]
    return torch.stack(sums) if sums else empty_GC


def mean_of(sums: Sequence[Tensor], count: int) -> Tensor:
    """The mean token (C), float32. sums: everybody's, in window order."""
    return torch.cat(list(sums)).sum(0).div_(count).float()


def scatter_parts(tokens_NC: Tensor, sizes: Sequence[int], first: int, groups: int, mean_C: Tensor, device: torch.device) -> dict[Node, Tensor]:
    """Sums of (x - mean) (x - mean)^T over nodes of the tree. first: the number of the first of these window groups."""
    own = dict(enumerate(tokens_NC.split(list(sizes)), start=first))
    return partial_sums(lambda group: gram(own[group], mean_C, device), range(first, first + len(own)), groups)


def leading_axes(parts: dict[Node, Any], groups: int, count: int, components: int, seed: int,
                 take: Callable[[Any], Tensor] = lambda part: part) -> Tensor:
    """The leading principal axes (D, C), orthonormal, largest variance first; float32. parts: everybody's. take: see `total`."""
    covariance_CC = total(parts, 0, groups, take).div_(count)
    if len(covariance_CC) > WHOLE and components * MORE < len(covariance_CC) / 2:
        return _by_iteration(covariance_CC, components, seed)
    return torch.linalg.eigh(covariance_CC).eigenvectors.flip(1)[:, :components].T.contiguous()


def _by_iteration(covariance_CC: Tensor, components: int, seed: int) -> Tensor:
    """Subspace iteration with a Rayleigh-Ritz step at its end. Source: Halko, Martinsson and Tropp (arXiv 0909.4061)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = int(components * MORE) + 16
    basis_CQ = torch.linalg.qr(torch.randn(len(covariance_CC), vectors, generator=generator).to(covariance_CC.device)).Q
    held = 0.0
    for _ in range(MOST):
        product_CQ = covariance_CC @ basis_CQ
        before, held = held, float((basis_CQ * product_CQ).sum())
        basis_CQ = torch.linalg.qr(product_CQ).Q
        if held - before <= CHANGE * held:
            break
    within_QQ = basis_CQ.T @ (covariance_CC @ basis_CQ)
    turn_QQ = torch.linalg.eigh((within_QQ + within_QQ.T) / 2).eigenvectors.flip(1)
    return (basis_CQ @ turn_QQ[:, :components]).T.contiguous()


def project(tokens_NC: Tensor, sizes: Sequence[int], mean_C: Tensor, axes_DC: Tensor, device: torch.device) -> Tensor:
    """The tokens in their principal components (N, D), float32 on `device`; each window group by itself."""
    offset_D = axes_DC @ mean_C
    groups = tokens_NC.split(list(sizes))
    pieces = [torch.addmm(-offset_D, chunk_NC.float(), axes_DC.T) for group_NC in groups for chunk_NC in chunks(group_NC, device)]
    return torch.cat(pieces) if pieces else offset_D.new_empty(0, len(offset_D))
