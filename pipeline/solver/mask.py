"""Which weights go: unstructured and N:M masks.

Shapes: E experts, R rows (out features), B columns of one block, M group width of N:M.
"""

import functools
import importlib.util

import torch
from torch import Tensor


def thresholds(scores_EBR: Tensor, fraction: float, rows: list[int]) -> Tensor:
    """The score (E, R) up to which a row's weights go: the one at index int(numel * fraction) in sorted order.

    It is taken over all rows of one linear at once (`rows` lists the rows of the linears stacked in R) and separately for
    every expert. Source: SparseGPT (arXiv 2301.00774), its reference implementation's `thresh`.
    """
    if fraction == 0:
        return scores_EBR.new_full((len(scores_EBR), scores_EBR.shape[2]), -1.0)  # no score is negative
    each_E = [_in_sorted_order(scores.flatten(1), int(scores[0].numel() * fraction)) for scores in scores_EBR.split(rows, dim=2)]
    return torch.cat([one_E[:, None].expand(-1, count) for one_E, count in zip(each_E, rows)], dim=1)


def _in_sorted_order(values_EN: Tensor, index: int) -> Tensor:
    """The value at a place of every expert's sorted values, which are not negative."""
    if values_EN.is_cuda and values_EN.dtype == torch.float32 and has_triton():
        from pipeline.solver import select

        return select.select(values_EN, index)  # kthvalue gives a GPU one thread block an expert
    return values_EN.kthvalue(index + 1, dim=1).values


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def n_of_m_mask(scores_EMR: Tensor, n: int) -> Tensor:
    """True where a weight is pruned: the M - n smallest scores of each row's M; `n` are kept."""
    pruned = scores_EMR.topk(scores_EMR.shape[1] - n, dim=1, largest=False).indices
    return torch.zeros_like(scores_EMR, dtype=torch.bool).scatter_(1, pruned, True)
