"""Upper Cholesky factors of inverse Hessians, batched over experts, with a bounded damping ladder.

Shapes: E experts, C columns (in features).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.solver.products import add_product, strips

DAMPING = 0.01  # of the mean diagonal, as published
# Total damping tried, in units of DAMPING: as published it is added again and again; later steps double so that it ends.
LADDER = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

LEAF = 512  # columns of a matrix that the library factors; what is larger is halved


@dataclass
class Factor:
    """`upper_ECC`: R with R^T R = (H + damping)^-1; `dead_EC`: columns no token ever used; `damping_E`: as a share of the
    mean diagonal."""

    upper_ECC: Tensor
    dead_EC: Tensor
    damping_E: Tensor


def inverse_factor(hessian_ECC: Tensor) -> Factor:
    """Factor every expert's Hessian. float32 or float64; float32 products never use TF32.

    With H = U U^T, U upper, R = U^-1 is upper and R^T R = H^-1: one factorization and one triangular inverse, made
    together, where the textbook takes two factorizations and a full inverse.

    Raises ArithmeticError if a Hessian has no factor even at ten times its mean diagonal (it holds NaN or infinities).
    """
    experts = len(hessian_ECC)
    dead_EC = hessian_ECC.diagonal(dim1=1, dim2=2) == 0
    diagonal_EC = hessian_ECC.diagonal(dim1=1, dim2=2) + dead_EC.to(hessian_ECC.dtype)
    unit_E = DAMPING * diagonal_EC.mean(dim=1)

    upper_ECC, damping_E = hessian_ECC.clone(), torch.zeros(experts, dtype=torch.float64)
    pending = torch.arange(experts, device=hessian_ECC.device)
    for step in LADDER:
        work_ECC = upper_ECC if len(pending) == experts else hessian_ECC[pending]
        if step > LADDER[0] and work_ECC is upper_ECC:
            upper_ECC.copy_(hessian_ECC)
        work_ECC.diagonal(dim1=1, dim2=2).copy_(diagonal_EC[pending] + step * unit_E[pending, None])
        info_E = _invert_root(work_ECC)
        good_E = (info_E == 0) & work_ECC.triu_().sum(dim=(1, 2)).isfinite()
        if work_ECC is not upper_ECC:
            upper_ECC[pending[good_E]] = work_ECC[good_E]
        damping_E[pending[good_E].cpu()] = step * DAMPING
        pending = pending[~good_E]
        if not len(pending):
            return Factor(upper_ECC, dead_EC, damping_E)
    raise ArithmeticError(f"the Hessian of expert {int(pending[0])} in this batch is not finite")


def _invert_root(matrix_ECC: Tensor) -> Tensor:
    """Replace the upper triangle of H by that of R = U^-1 with H = U U^T; returns LAPACK's info (E), 0 where it worked.

    By halves, so that nearly all of it is matrix products. With H = [[A, B], [B^T, D]] and U = [[V, X], [0, W]]:
    W W^T = D, X = B W^-T, V V^T = A - X X^T, and R = [[V^-1, -V^-1 X W^-1], [0, W^-1]].
    The lower triangle holds leftovers.
    """
    columns = matrix_ECC.shape[1]
    if columns <= LEAF:
        return _invert_leaf(matrix_ECC)
    half = LEAF * -(-columns // (2 * LEAF))
    a_ECC, b_ECC, d_ECC = matrix_ECC[:, :half, :half], matrix_ECC[:, :half, half:], matrix_ECC[:, half:, half:]
    info_E = _invert_root(d_ECC)
    d_ECC.triu_()
    x_ECC = torch.empty_like(b_ECC, memory_format=torch.contiguous_format)
    for part in strips(columns - half):  # W^-1 is upper: what it multiplies begins at the strip
        add_product(x_ECC[:, :, part], b_ECC[:, :, part.start:], d_ECC[:, part, part.start:].mT, beta=0)
    for part in strips(half):  # of a symmetric matrix the upper triangle is enough
        add_product(a_ECC[:, :part.stop, part], x_ECC[:, :part.stop], x_ECC[:, part].mT, alpha=-1)
    info_E = info_E + _invert_root(a_ECC)
    a_ECC.triu_()
    for part in strips(columns - half):
        add_product(b_ECC[:, :, part], x_ECC[:, :, :part.stop], d_ECC[:, :part.stop, part], beta=0)
    x_ECC.copy_(b_ECC)
    for part in strips(half):
        add_product(b_ECC[:, part], a_ECC[:, part, part.start:], x_ECC[:, part.start:], alpha=-1, beta=0)
    return info_E


def _invert_leaf(matrix_ECC: Tensor) -> Tensor:
    """With P the reversal and L the lower factor of P H P, U = P L P. A matrix without a factor leaves what it will."""
    lower_ECC, info_E = torch.linalg.cholesky_ex(matrix_ECC.flip(1, 2))
    identity = torch.eye(matrix_ECC.shape[1], dtype=matrix_ECC.dtype, device=matrix_ECC.device).expand_as(lower_ECC)
    matrix_ECC.copy_(torch.linalg.solve_triangular(lower_ECC, identity, upper=False).flip(1, 2))
    return info_E.abs()
