"""Plain one-matrix SparseGPT and GPTQ in float64, straight from the papers: three factorizations, one column at a time.

The truth that the batched solver is judged by. Written to be read, not to be fast.
Shapes: R rows (out features), C columns (in features).
"""

import torch
from torch import Tensor

BLOCK = 128


def hessian(tokens_NC: Tensor) -> Tensor:
    tokens_NC = tokens_NC.double()
    return 2 / len(tokens_NC) * tokens_NC.T @ tokens_NC


class RowGrids:
    """The asymmetric or symmetric integer grid of every row over some columns, without a search for its range."""

    def __init__(self, weight_RW: Tensor, bits: int, symmetric: bool):
        low, high = weight_RW.amin(1).clamp(max=0), weight_RW.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        self.top = 2**bits - 1
        self.scale = (high - low) / self.top
        self.zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else torch.round(-low / self.scale)

    def round(self, weight_R: Tensor) -> Tensor:
        level = torch.clamp(torch.round(weight_R / self.scale) + self.zero, 0, self.top)
        return self.scale * (level - self.zero)


def sparsegpt(weight_RC: Tensor, hessian_CC: Tensor, fraction: float = 0.0, n: int = 0, m: int = 0, bits: int | None = None,
              group_size: int | None = None, symmetric: bool = False, damping: float = 0.01, dtype: torch.dtype = torch.float64) -> Tensor:
    """Prune `fraction` of the weights, or keep n of every m, and round to `bits` in the same pass. The benchmarks run it in float32."""
    dense, weight, hessian = weight_RC.to(dtype), weight_RC.to(dtype).clone(), hessian_CC.to(dtype).clone()
    device = weight.device
    rows, columns = weight.shape
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=dtype, device=device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    width = group_size or columns
    grids = [RowGrids(dense[:, start:start + width], bits, symmetric) for start in range(0, columns, width)] if bits else None
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        pruned = torch.zeros(rows, stop - start, dtype=torch.bool, device=device)
        if not m and fraction:
            scores = (weight[:, start:stop] / upper.diagonal()[start:stop]) ** 2
            threshold = scores.flatten().sort().values[int(scores.numel() * fraction)]
            pruned = scores <= threshold
        errors = torch.zeros(rows, stop - start, dtype=dtype, device=device)
        for column in range(start, stop):
            if m and column % m == 0:
                scores = (weight[:, column:column + m] / upper.diagonal()[column:column + m]) ** 2
                least = scores.argsort(dim=1)[:, :m - n]
                pruned[:, column - start:column - start + m] = torch.zeros(rows, m, dtype=torch.bool, device=device).scatter_(1, least, True)
            before = weight[:, column].clone()
            weight[pruned[:, column - start], column] = 0
            if bits:
                weight[:, column] = grids[column // width].round(weight[:, column])
            error = (before - weight[:, column]) / upper[column, column]
            weight[:, column + 1:stop] -= torch.outer(error, upper[column, column + 1:stop])
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight
