"""What a layer's file holds.

By their names in the block the experts' weights (E, R, C) and the routers' tensors, and as `labels.G` the expert of every
calibration token (N) for router G: with them a resumed job replays the finished blocks instead of keeping activations on disk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.modeling_sparse_expansion import router_name


def shard_tensors(groups: Sequence[Sequence[str]], weights: dict[str, Tensor], routers: Sequence[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """What a layer's shard holds. groups: the linears of each router. weights: experts (E, R, C) by path. routers: for each its
    tensors and the labels (N) of all tokens."""
    tensors = {f"{path}.weight": weight_ERC for path, weight_ERC in weights.items()}
    for number, (group, (router, labels_N)) in enumerate(zip(groups, routers)):
        tensors |= {f"{router_name(list(group))}.{name}": tensor for name, tensor in router.items()}
        tensors[f"labels.{number}"] = labels_N.to(torch.uint8 if len(weights[group[0]]) <= 256 else torch.int32)
    return tensors
