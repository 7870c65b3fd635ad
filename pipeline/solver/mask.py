"""Which weights go: unstructured and N:M masks.

Shapes: E experts, R rows (out features), B columns of one block, M group width of N:M.
"""

import torch
from torch import Tensor


def unstructured_mask(scores_ERB: Tensor, fraction: float, rows: list[int]) -> Tensor:
    """True where a weight is pruned: scores up to the one at index int(numel * fraction) in sorted order.

    The threshold is taken over all rows of one linear at once (`rows` lists the rows of the linears stacked in R) and
    separately for every expert. Source: SparseGPT (arXiv 2301.00774), its reference implementation's `thresh`.
    """
    if fraction == 0:
        return torch.zeros_like(scores_ERB, dtype=torch.bool)
    masks = []
    for scores in scores_ERB.split(rows, dim=1):
        flat = scores.flatten(1)
        threshold_E = flat.kthvalue(int(flat.shape[1] * fraction) + 1, dim=1).values
        masks.append(scores <= threshold_E[:, None, None])
    return torch.cat(masks, dim=1)


def n_of_m_mask(scores_ERM: Tensor, n: int) -> Tensor:
    """True where a weight is pruned: the M - n smallest scores of each row's M; `n` are kept."""
    pruned = scores_ERM.topk(scores_ERM.shape[-1] - n, dim=-1, largest=False).indices
    return torch.zeros_like(scores_ERM, dtype=torch.bool).scatter_(-1, pruned, True)
