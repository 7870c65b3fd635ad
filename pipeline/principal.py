"""Principal components from the Gram matrix: the leading ones alone.

Shapes: N tokens, C columns (in features), D components, Q vectors that are iterated.
"""

import torch
from torch import Tensor

from pipeline.gram import chunks, gram

WHOLE = 2048  # columns up to which a full decomposition is the fastest
MORE = 1.25  # vectors iterated for each component wanted: the last ones converge with the gap to the first one left out
CHANGE, MOST = 1e-3, 30  # stop when the variance that the vectors hold grows by less than this share, or after so many rounds


def principal_axes(tokens_NC: Tensor, components: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (C) and the leading principal axes (D, C), orthonormal, largest variance first; float32."""
    mean_C = sum(chunk_NC.sum(0, dtype=torch.float32).double() for chunk_NC in chunks(tokens_NC)).div_(len(tokens_NC)).float()
    covariance_CC = gram(tokens_NC, mean_C).div_(len(tokens_NC))
    if len(covariance_CC) > WHOLE and components * MORE < len(covariance_CC) / 2:
        return mean_C, _leading(covariance_CC, components, seed)
    return mean_C, torch.linalg.eigh(covariance_CC).eigenvectors.flip(1)[:, :components].T.contiguous()


def _leading(covariance_CC: Tensor, components: int, seed: int) -> Tensor:
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


def project(tokens_NC: Tensor, mean_C: Tensor, axes_DC: Tensor) -> Tensor:
    """The tokens in their principal components (N, D), float32."""
    offset_D = axes_DC @ mean_C
    return torch.cat([torch.addmm(-offset_D, chunk_NC.float(), axes_DC.T) for chunk_NC in chunks(tokens_NC)])
