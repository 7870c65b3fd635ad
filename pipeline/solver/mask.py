"""Which weights go: unstructured and N:M patterns.

Shapes: E experts, R rows (out features), B columns of one block, M group width of N:M.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

ALLOWED = "a fraction from 0 up to but not including 1 (such as 0.5), or N:M with 0 < N < M <= 128, N kept of every M (such as 2:4)"


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: either a `fraction` of weights pruned, or `n` kept of every `m` consecutive columns."""

    fraction: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str | float) -> "Pattern":
        """Read `0.5`, `2:4` or `(2, 4)`. Raises ValueError with what is allowed."""
        text = str(text).strip()
        pair = re.fullmatch(r"(\d+)\s*:\s*(\d+)|\(\s*(\d+)\s*,\s*(\d+)\s*\)", text)
        if pair:
            n, m = (int(number) for number in pair.groups() if number is not None)
            if not 0 < n < m <= 128:
                raise ValueError(ALLOWED)
            return cls(fraction=1 - n / m, n=n, m=m)
        try:
            fraction = float(text)
        except ValueError:
            raise ValueError(ALLOWED) from None
        if not 0 <= fraction < 1:
            raise ValueError(ALLOWED)
        return cls(fraction=fraction)

    @property
    def is_n_of_m(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_n_of_m else f"{self.fraction:g}"


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
