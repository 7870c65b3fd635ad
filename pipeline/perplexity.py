"""Perplexity, and the words that must stand beside it.

Shapes: W windows, L tokens of a window, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from pipeline.blocks import BlockwiseModel

LOGITS = 1 << 26  # that are held at a time: 256 MB in float32


def window_losses(model: "BlockwiseModel", hidden_WLH: Tensor, ids_WL: Tensor) -> list[float]:
    """For each window of a group that has left the last block, the mean cross entropy, in nats, of the L - 1 tokens that
    have one before them; float32."""
    windows = max(1, LOGITS // (ids_WL.shape[1] * model.vocabulary))
    losses = []
    for some_WLH, some_WL in zip(hidden_WLH.split(windows), ids_WL.split(windows)):
        logits_WLV = model.head(some_WLH)
        for logits_LV, ids_L in zip(logits_WLV, some_WL.to(logits_WLV.device)):
            losses.append(functional.cross_entropy(logits_LV[:-1].float(), ids_L[1:]))
    return torch.stack(losses).tolist()


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
