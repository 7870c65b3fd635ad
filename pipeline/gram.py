"""Hessians: sums of x x^T over an expert's tokens.

Shapes: N tokens, C columns (in features).
"""

import torch
from torch import Tensor


def hessian(parts_NC: list[Tensor]) -> Tensor:
    """2/n X^T X (C, C) in float32 over all tokens of the parts, summed in the order given.

    The sum and the count are accumulated and divided once: running means would differ between layouts.
    """
    columns = parts_NC[0].shape[1]
    total_CC = torch.zeros(columns, columns, device=parts_NC[0].device)
    count = 0
    for part_NC in parts_NC:
        part_NC = part_NC.float()
        total_CC.addmm_(part_NC.T, part_NC)
        count += len(part_NC)
    return total_CC.mul_(2 / max(count, 1))
