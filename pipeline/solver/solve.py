"""SparseGPT with optional GPTQ rounding, for all experts of a linear at once.

Shapes: E experts, R rows (out features), C columns (in features), B columns of one block. Weights are held transposed
while solving (E, C, R): the loop runs over columns, and a column is then contiguous for every expert.
"""

import torch
from torch import Tensor

from pipeline.pattern import Pattern
from pipeline.solver.factor import Factor
from pipeline.solver.mask import n_of_m_mask, unstructured_mask
from pipeline.solver.quantizer import Grid

BLOCK = 128  # columns whose error is carried to the right by one matrix product, as published


def solve(weight_RC: Tensor, factor: Factor, pattern: Pattern, rows: list[int], grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Prune (and round) one dense weight for every expert's Hessian factor.

    weight_RC: the dense weight in the factor's dtype; several linears that share their input may be stacked along R, and
    `rows` then lists the rows of each, since an unstructured threshold is one linear's own.
    Returns the experts' weights (E, R, C), pruned ones exactly 0, and the loss of every row (E, R): its squared output error
    2/n |(w - w') X|^2 plus the damping's share, which the errors of the columns sum up to. N:M needs C to be a multiple of M.

    Source: SparseGPT (arXiv 2301.00774), algorithm 1, with the block size of its reference implementation.
    """
    upper_ECC = factor.upper_ECC
    experts, columns = upper_ECC.shape[:2]
    block = BLOCK - BLOCK % pattern.m if pattern.is_n_of_m else BLOCK
    weight_ECR = weight_RC.T.expand(experts, -1, -1).clone()
    weight_ECR.masked_fill_(factor.dead_EC[:, :, None], 0)
    loss_ER = weight_ECR.new_zeros(experts, len(weight_RC))
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        error_EBR = _solve_block(
            weight_ECR[:, start:stop], upper_ECC[:, start:stop, start:stop], pattern, rows, grid, start)
        _carry_right(weight_ECR[:, stop:], upper_ECC[:, start:stop, stop:], error_EBR)
        loss_ER += error_EBR.square_().sum(1)
    return weight_ECR.transpose(1, 2).contiguous(), loss_ER


def _solve_block(weight_EBR: Tensor, upper_EBB: Tensor, pattern: Pattern, rows: list[int], grid: Grid | None, start: int) -> Tensor:
    """Solve the columns of one block in place, left to right; returns the scaled errors (E, B, R)."""
    diagonal_EB = upper_EBB.diagonal(dim1=1, dim2=2)
    error_EBR = torch.empty_like(weight_EBR, memory_format=torch.contiguous_format)

    def scores_ERB(first: int, last: int) -> Tensor:
        return (weight_EBR[:, first:last] / diagonal_EB[:, first:last, None]).square_().transpose(1, 2)

    if not pattern.is_n_of_m:
        pruned_EBR = unstructured_mask(scores_ERB(0, weight_EBR.shape[1]), pattern.fraction, rows).transpose(1, 2).contiguous()
    for column in range(weight_EBR.shape[1]):
        within = column % pattern.m if pattern.is_n_of_m else column
        if pattern.is_n_of_m and within == 0:
            pruned_EBR = n_of_m_mask(scores_ERB(column, column + pattern.m), pattern.n).transpose(1, 2)
        dense_ER = weight_EBR[:, column].clone()
        solved_ER = dense_ER.masked_fill(pruned_EBR[:, within], 0)
        if grid is not None:
            solved_ER = grid.round_column(solved_ER, start + column)
        error_ER = torch.sub(dense_ER, solved_ER, out=error_EBR[:, column]).div_(diagonal_EB[:, column, None])
        weight_EBR[:, column] = solved_ER
        weight_EBR[:, column + 1:].addcmul_(upper_EBB[:, column, column + 1:, None], error_ER[:, None, :], value=-1)
    return error_EBR


def _carry_right(weight_ECR: Tensor, upper_EBC: Tensor, error_EBR: Tensor) -> None:
    """weight -= upper^T error, expert by expert: the result of one expert then never depends on its neighbours in the batch."""
    for weight_CR, upper_BC, error_BR in zip(weight_ECR, upper_EBC, error_EBR):
        weight_CR.addmm_(upper_BC.T, error_BR, alpha=-1)
