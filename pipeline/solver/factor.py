"""Upper Cholesky factors of inverse Hessians, batched over experts, with a bounded damping ladder.

Shapes: E experts, C columns (in features).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, as published
# Total damping tried, in units of DAMPING: as published it is added again and again; later steps double so that it ends.
LADDER = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

SMALL = 512  # columns of a matrix that batched library routines are good for


@dataclass
class Factor:
    """`upper_ECC`: R with R^T R = (H + damping)^-1; `dead_EC`: columns no token ever used; `damping_E`: as a share of the
    mean diagonal."""

    upper_ECC: Tensor
    dead_EC: Tensor
    damping_E: Tensor


def inverse_factor(hessian_ECC: Tensor) -> Factor:
    """Factor every expert's Hessian. float32 or float64; float32 products never use TF32.

    With P the reversal of the columns and L the lower factor of P H P, R = P L^-1 P is upper and R^T R = H^-1: one
    factorization and one triangular inverse, where the textbook takes two factorizations and a full inverse.

    Raises ArithmeticError if a Hessian has no factor even at ten times its mean diagonal (it holds NaN or infinities).
    """
    experts, columns = hessian_ECC.shape[:2]
    diagonal_EC = hessian_ECC.diagonal(dim1=1, dim2=2)
    dead_EC = diagonal_EC == 0
    reversed_ECC = hessian_ECC.flip(1, 2)
    reversed_diagonal_EC = reversed_ECC.diagonal(dim1=1, dim2=2)
    reversed_diagonal_EC += dead_EC.flip(1).to(hessian_ECC.dtype)
    unit_E = DAMPING * reversed_diagonal_EC.mean(dim=1)

    lower_ECC = torch.empty_like(reversed_ECC)
    damping_E = torch.zeros(experts, dtype=torch.float64)
    pending, added = torch.arange(experts, device=hessian_ECC.device), 0
    for step in LADDER:
        diagonal = reversed_diagonal_EC[pending] + (step - added) * unit_E[pending, None]
        reversed_diagonal_EC[pending] = diagonal
        added = step
        factor, info = _cholesky(reversed_ECC[pending])
        good = (info == 0) & factor.flatten(1).isfinite().all(dim=1)
        lower_ECC[pending[good]] = factor[good]
        damping_E[pending[good].cpu()] = step * DAMPING
        pending = pending[~good]
        if not len(pending):
            break
    else:
        raise ArithmeticError(f"the Hessian of expert {int(pending[0])} in this batch is not finite")
    del reversed_ECC
    _invert_lower(lower_ECC)
    return Factor(lower_ECC.flip(1, 2), dead_EC, damping_E)


def _cholesky(hessian_ECC: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors and LAPACK's info. Large matrices one by one: batched routines are made for small ones."""
    if hessian_ECC.shape[1] <= SMALL:
        return torch.linalg.cholesky_ex(hessian_ECC)
    factors, infos = zip(*(torch.linalg.cholesky_ex(hessian_CC) for hessian_CC in hessian_ECC))
    return torch.stack(factors), torch.stack(infos)


def _invert_lower(lower_ECC: Tensor) -> None:
    """L^-1 in place. By halves, so that nearly all of it is matrix products: [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]."""
    columns = lower_ECC.shape[1]
    if columns <= SMALL:
        identity = torch.eye(columns, dtype=lower_ECC.dtype, device=lower_ECC.device).expand_as(lower_ECC)
        lower_ECC.copy_(torch.linalg.solve_triangular(lower_ECC, identity, upper=False))
        return
    half = columns // 2
    first, second = lower_ECC[:, :half, :half], lower_ECC[:, half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    for below_CC, first_CC, second_CC in zip(lower_ECC[:, half:, :half], first, second):
        below_CC.copy_((second_CC @ (below_CC @ first_CC)).neg_())
