"""A dense and an expanded model side by side on one text: the loss of every token, and the experts that it went to."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.modeling_sparse_expansion import Router
from pipeline.saved_model import Loaded

STRONG = 2.0  # nats of difference that are shown in full colour
HUES = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#999933", "#882255", "#44aa99", "#332288", "#ddcc77", "#cc6677", "#88ccee",
        "#117733", "#ee7733"]  # Paul Tol's, which most eyes tell apart


@dataclass
class Comparison:
    """tokens: the text's, as strings. dense, expanded: loss of each but the first, in nats. experts: of every token, by router."""

    tokens: list[str]
    dense: list[float]
    expanded: list[float]
    experts: dict[str, list[int]]

    def as_dict(self) -> dict:
        mean = lambda losses: sum(losses) / len(losses)  # noqa: E731
        return {"tokens": self.tokens, "dense_loss": self.dense, "expanded_loss": self.expanded, "experts": self.experts,
                "mean_dense_loss": mean(self.dense), "mean_expanded_loss": mean(self.expanded)}


@torch.no_grad()
def compare(dense: Loaded, expanded: Loaded, text: str) -> Comparison:
    """Raises UserError if the text is too short, or the tokenizers differ."""
    ids_1L = expanded.ids(text)
    length = min(ids_1L.shape[1], expanded.model.config.max_position_embeddings)
    ids_1L = ids_1L[:, :length]
    if length < 2:
        raise UserError(f"The text to compare on has {length} tokens; at least 2 are needed.")
    if not torch.equal(dense.ids(text)[:, :length].cpu(), ids_1L.cpu()):
        raise UserError("The two models' tokenizers read the text differently; compare a saved model with the dense one that it was made of.")
    chosen: dict[str, list[int]] = {}
    hooks = [module.register_forward_hook(lambda _module, _inputs, experts_N, name=name: chosen.__setitem__(name, experts_N.tolist()))
             for name, module in expanded.model.named_modules() if isinstance(module, Router)]
    try:
        losses = _losses(expanded, ids_1L)
    finally:
        for hook in hooks:
            hook.remove()
    return Comparison([expanded.tokenizer.decode(token) for token in ids_1L[0]], _losses(dense, ids_1L), losses, chosen)


def _losses(loaded: Loaded, ids_1L: Tensor) -> list[float]:
    ids_1L = ids_1L.to(loaded.model.device)
    logits_LV = loaded.model(ids_1L).logits[0, :-1].float()
    return functional.cross_entropy(logits_LV, ids_1L[0, 1:], reduction="none").tolist()


def show(comparison: Comparison, layer: int | None, console: Console) -> None:
    """Print the text coloured by what the experts cost or gain, and by the expert of each token in one layer (the middle one unless given)."""
    summary = comparison.as_dict()
    console.print(f"Loss per token: dense {summary['mean_dense_loss']:.3f}, expanded {summary['mean_expanded_loss']:.3f} "
                  f"({summary['mean_expanded_loss'] - summary['mean_dense_loss']:+.3f}). Red: the experts cost, green: they gain; full colour from {STRONG:g} nats.")
    text = Text(comparison.tokens[0])
    for token, dense, expanded in zip(comparison.tokens[1:], comparison.dense, comparison.expanded):
        strength = int(255 * (1 - min(1.0, abs(expanded - dense) / STRONG)))
        colour = f"#ff{strength:02x}{strength:02x}" if expanded > dense else f"#{strength:02x}ff{strength:02x}"
        text.append(token, Style(color="#000000", bgcolor=colour))
    console.print(text)
    if not comparison.experts:
        console.print("There is one expert in every linear.")
        return
    layers = sorted({_layer(name) for name in comparison.experts})
    layer = layers[len(layers) // 2] if layer is None else layer
    if layer not in layers:
        raise UserError(f"--layer is {layer}; allowed is {layers[0]} to {layers[-1]}.")
    for name, experts in comparison.experts.items():
        if _layer(name) == layer:
            console.print(f"\n{name}: experts " + ", ".join(f"{expert} ({experts.count(expert)})" for expert in sorted(set(experts))))
            text = Text()
            for token, expert in zip(comparison.tokens, experts):
                text.append(token, Style(color="#ffffff", bgcolor=HUES[expert % len(HUES)]))
            console.print(text)


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


