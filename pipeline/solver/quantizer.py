"""Integer grids: scale and zero point per row (and per group of columns), taken from the dense weight.

Shapes: R rows (out features), C columns (in features), G groups of columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_STEPS, SHRINK_RANGE, ERROR_POWER = 100, 0.8, 2.4  # of the search in the reference GPTQ quantizer


@dataclass
class Grid:
    """`scale_RG` and `zero_RG` (an integer in floating point) for levels 0 .. `top`; a group spans `width` columns."""

    scale_RG: Tensor
    zero_RG: Tensor
    top: int
    width: int

    def round_column(self, weight_ER: Tensor, column: int) -> Tensor:
        """The nearest grid values of one column of every expert; 0 stays exactly 0."""
        group = column // self.width
        return _round(weight_ER, self.scale_RG[:, group], self.zero_RG[:, group], self.top)


def _round(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    level = (weight / scale).round().add(zero).clamp(0, top)
    return scale * (level - zero)


def find_grid(weight_RC: Tensor, bits: int, group_size: int | None, symmetric: bool, mse: bool) -> Grid:
    """Fit the grid to the dense weight, as the published method does: every expert of a linear shares it.

    The range always includes 0, so that a pruned weight is representable. `symmetric` centres the range on 0. `mse`
    shrinks the range to the one with the smallest sum of |error|^2.4. A last group may be narrower than `group_size`.
    Source: GPTQ (arXiv 2210.17323), its reference implementation's Quantizer.
    """
    rows, columns = weight_RC.shape
    width = group_size or columns
    top = 2**bits - 1
    padding = -columns % width
    grouped_RGW = torch.nn.functional.pad(weight_RC, (0, padding)).unflatten(1, (-1, width))
    low = grouped_RGW.amin(-1).clamp(max=0)
    high = grouped_RGW.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scale, zero = _grid_of_range(low, high, top, symmetric)
    if mse:
        best = torch.full_like(scale, torch.inf)
        for step in range(int(SHRINK_STEPS * SHRINK_RANGE)):
            shrink = 1 - step / SHRINK_STEPS
            a_scale, a_zero = _grid_of_range(low * shrink, high * shrink, top, symmetric)
            rounded = _round(grouped_RGW, a_scale[..., None], a_zero[..., None], top)
            error = (rounded - grouped_RGW).abs_().pow_(ERROR_POWER).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, a_scale, scale), torch.where(better, a_zero, zero)
    return Grid(scale, zero, top, width)


def _grid_of_range(low: Tensor, high: Tensor, top: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = (high - low) / top
    zero = torch.full_like(scale, (top + 1) // 2) if symmetric else (-low / scale).round()
    return scale, zero
