"""Perplexity, and the words that must stand beside it.

Shapes: W windows, L tokens of a window, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional


def window_loss(logits_LV: Tensor, ids_L: Tensor) -> float:
    """Mean cross entropy, in nats, of the L - 1 tokens that have one before them; float32."""
    return float(functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:].to(logits_LV.device)))


@dataclass
class Perplexity:
    """exp of the mean over non-overlapping windows of the window's mean cross entropy, per token."""

    perplexity: float
    dataset: str  # with split, revision or hash
    windows: int
    window_length: int
    dtype: str

    @classmethod
    def of(cls, losses: list[float], dataset: str, window_length: int, dtype: str) -> "Perplexity":
        mean = torch.tensor(losses, dtype=torch.float64).mean()
        return cls(float(mean.exp()), dataset, len(losses), window_length, dtype)

    def described(self) -> str:
        return f"per token, {self.dataset}, {self.windows} windows of {self.window_length} tokens, {self.dtype}"

    def as_dict(self) -> dict:
        return asdict(self)
