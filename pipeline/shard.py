"""What a layer's file holds.

`PATH.E.weight` (R, C) for every expert E of every linear; the routers' tensors by their names in the block; and as `labels.G` the
expert of every calibration token (N) for router G: with them a resumed job replays the finished blocks instead of keeping
activations on disk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.modeling_sparse_expansion import router_name


def expert_tensors(experts: Sequence[int], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of some experts, whose weights (E, R, C) are given by path."""
    return {f"{path}.{expert}.weight": weight_RC for path, weight_ERC in weights.items() for expert, weight_RC in zip(experts, weight_ERC)}


def router_tensors(groups: Sequence[Sequence[str]], routers: Sequence[tuple[dict[str, Tensor], Tensor]], num_experts: int) -> dict[str, Tensor]:
    """groups: the linears of each router. routers: for each its tensors and the labels (N) of all tokens."""
    tensors = {}
    for number, (group, (router, labels_N)) in enumerate(zip(groups, routers)):
        tensors |= {f"{router_name(list(group))}.{name}": tensor for name, tensor in router.items()}
        tensors[f"labels.{number}"] = labels_N.to(torch.uint8 if num_experts <= 256 else torch.int32)
    return tensors


def take_labels(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Take the labels out of a shard's tensors, in the routers' order."""
    names = sorted((name for name in tensors if name.startswith("labels.")), key=lambda name: int(name.partition(".")[2]))
    return [tensors.pop(name) for name in names]


def stacked(tensors: dict[str, Tensor], path: str, num_experts: int, device: torch.device | str = "cpu") -> Tensor:
    """All experts (E, R, C) of a linear on `device`, from a shard's tensors."""
    first = tensors[f"{path}.0.weight"]
    whole_ERC = torch.empty(num_experts, *first.shape, dtype=first.dtype, device=device)
    for expert in range(num_experts):
        whole_ERC[expert].copy_(tensors[f"{path}.{expert}.weight"])
    return whole_ERC
