"""SparseGPT with optional GPTQ rounding, for all experts of a linear at once.

Shapes: E experts, R rows (out features), C columns (in features), B columns of one block. Weights are held transposed
while solving (E, C, R): the loop runs over columns, and a column is then contiguous for every expert.
"""

import torch
from torch import Tensor

from pipeline.pattern import Pattern
from pipeline.solver.factor import Factor
from pipeline.solver.mask import has_triton, n_of_m_mask, thresholds
from pipeline.solver.products import add_product
from pipeline.solver.quantizer import Grid

BLOCK = 128  # columns that a threshold is taken over, as published, and whose errors are carried to the right together
FAR = 4  # blocks whose errors are carried beyond them all by one matrix product: fewer passes over the rest of the weight
STRIP = 16  # columns of a block that stay in a CPU's cache together


def solve(weight_RC: Tensor, factor: Factor, pattern: Pattern, rows: list[int], grid: Grid | None = None,
          dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Prune (and round) one dense weight for every expert's Hessian factor.

    weight_RC: the dense weight in the factor's dtype; several linears that share their input may be stacked along R, and
    `rows` then lists the rows of each, since an unstructured threshold is one linear's own.
    Returns the experts' weights (E, R, C) in `dtype` (the weight's own unless given), pruned ones exactly 0, and the loss of
    every row (E, R): its squared output error 2/n |(w - w') X|^2 plus the damping's share, which the errors of the columns
    sum up to. N:M needs C to be a multiple of M.

    Source: SparseGPT (arXiv 2301.00774), algorithm 1, with the block size of its reference implementation.
    """
    upper_ECC = factor.upper_ECC
    experts, columns = upper_ECC.shape[:2]
    block = BLOCK - BLOCK % pattern.m if pattern.is_n_of_m else BLOCK
    weight_ECR = weight_RC.T.expand(experts, -1, -1).clone(memory_format=torch.contiguous_format)
    weight_ECR.masked_fill_(factor.dead_EC[:, :, None], 0)
    loss_ER = weight_ECR.new_zeros(experts, len(weight_RC))
    for near in range(0, columns, FAR * block):
        far = min(near + FAR * block, columns)
        error_EBR = weight_ECR.new_empty(experts, far - near, len(weight_RC))
        for start in range(near, far, block):
            stop = min(start + block, far)
            _solve_block(weight_ECR[:, start:stop], upper_ECC[:, start:stop, start:stop], error_EBR[:, start - near:stop - near], pattern, rows, grid, start)
            add_product(weight_ECR[:, stop:far], upper_ECC[:, start:stop, stop:far].mT, error_EBR[:, start - near:stop - near], alpha=-1)
        add_product(weight_ECR[:, far:], upper_ECC[:, near:far, far:].mT, error_EBR, alpha=-1)
        loss_ER += error_EBR.square_().sum(1)
    return weight_ECR.transpose(1, 2).to(dtype or weight_RC.dtype, memory_format=torch.contiguous_format), loss_ER


def _solve_block(weight_EBR: Tensor, upper_EBB: Tensor, error_EBR: Tensor, pattern: Pattern, rows: list[int], grid: Grid | None, start: int) -> None:
    """Solve the columns of one block in place, left to right; their scaled errors go to error_EBR."""
    threshold_ER = None
    if not pattern.is_n_of_m:
        threshold_ER = thresholds(_scores(weight_EBR, upper_EBB.diagonal(dim1=1, dim2=2)), pattern.fraction, rows)
    if weight_EBR.is_cuda and weight_EBR.dtype == torch.float32 and has_triton():
        from pipeline.solver import kernel

        kernel.solve_block(weight_EBR, upper_EBB, error_EBR, threshold_ER, pattern, grid, start)
    else:
        _solve_columns(weight_EBR, upper_EBB, error_EBR, threshold_ER, pattern, grid, start)


def _solve_columns(weight_EBR: Tensor, upper_EBB: Tensor, error_EBR: Tensor, threshold_ER: Tensor | None, pattern: Pattern, grid: Grid | None,
                   start: int) -> None:
    """The kernel's plain twin. Columns go in strips of about STRIP: inside one, column by column in the cache; what is right of it
    in the block follows by one matrix product."""
    diagonal_EB = upper_EBB.diagonal(dim1=1, dim2=2)
    if not pattern.is_n_of_m:
        pruned_EBR = _scores(weight_EBR, diagonal_EB) <= threshold_ER[:, None]
    columns = weight_EBR.shape[1]
    strip = -(-STRIP // pattern.m) * pattern.m if pattern.is_n_of_m else STRIP
    for first in range(0, columns, strip):
        last = min(first + strip, columns)
        for column in range(first, last):
            if pattern.is_n_of_m and column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                pruned_EMR = n_of_m_mask(_scores(weight_EBR[:, group], diagonal_EB[:, group]), pattern.n)
            pruned_ER = pruned_EMR[:, column % pattern.m] if pattern.is_n_of_m else pruned_EBR[:, column]
            dense_ER = weight_EBR[:, column].clone()
            solved_ER = dense_ER.masked_fill(pruned_ER, 0)
            if grid is not None:
                solved_ER = grid.round_column(solved_ER, start + column)
            error_ER = torch.sub(dense_ER, solved_ER, out=error_EBR[:, column]).div_(diagonal_EB[:, column, None])
            weight_EBR[:, column] = solved_ER
            weight_EBR[:, column + 1:last].addcmul_(upper_EBB[:, column, column + 1:last, None], error_ER[:, None, :], value=-1)
        add_product(weight_EBR[:, last:], upper_EBB[:, first:last, last:].mT, error_EBR[:, first:last], alpha=-1)


def _scores(weight_EBR: Tensor, diagonal_EB: Tensor) -> Tensor:
    """SparseGPT's score of every weight (E, B, R): what its going costs."""
    return (weight_EBR / diagonal_EB[:, :, None]).square_()

