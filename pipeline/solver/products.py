"""Batched matrix products that write where they are told: the solver's only heavy operation.

Shapes: E experts, M and N rows and columns of the result, K what is summed over.
"""

from torch import Tensor

STRIPS = 4  # of a product of which only a triangle is wanted, or one side is a triangle: 5/8 of the work instead of all
WORTH_STRIPS = 1024  # columns from which on that is faster than one product


def add_product(target_EMN: Tensor, left_EMK: Tensor, right_EKN: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """target = beta target + alpha left right, in place. On a CPU expert by expert: a result then never depends on its
    neighbours in the batch."""
    if target_EMN.is_cuda:
        target_EMN.baddbmm_(left_EMK, right_EKN, alpha=alpha, beta=beta)
        return
    for target_MN, left_MK, right_KN in zip(target_EMN, left_EMK, right_EKN):
        target_MN.addmm_(left_MK, right_KN, alpha=alpha, beta=beta)


def strips(columns: int) -> list[slice]:
    if columns < WORTH_STRIPS:
        return [slice(0, columns)]
    width = -(-columns // STRIPS)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
