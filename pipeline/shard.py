"""What a layer's file holds.

For every expert E of every linear `PATH.E.PART`, the parts of `packed_experts` without the dimension of experts (`PATH.E.weight`
(R, C) where nothing is saved by packing), and once for all its experts `PATH.scale` and `PATH.zero`; the routers' tensors by
their names in the block; and as `labels.G` the expert of every calibration token (N) for router G: with them a resumed job
replays the finished blocks instead of keeping activations on disk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.modeling_sparse_expansion import router_name
from pipeline.packed_experts import Form, unpack
from pipeline.packing import SHARED, joined, pack, shared_parts
from pipeline.solver.quantizer import Grid


def expert_tensors(forms: dict[str, Form | None], experts: Sequence[int], weights: dict[str, Tensor], grids: dict[str, Grid]) -> dict[str, Tensor]:
    """Of some experts, packed, with what all share. weights (E, R, C), grids: by path."""
    tensors = {}
    for path, weight_ERC in weights.items():
        form, grid = forms[path], grids.get(path)
        for expert, weight_RC in zip(experts, weight_ERC):
            parts = {"weight": weight_RC} if form is None else pack(form, weight_RC, grid)
            tensors |= {f"{path}.{expert}.{part}": tensor for part, tensor in parts.items()}
        if grid is not None:
            tensors |= {f"{path}.{part}": tensor for part, tensor in shared_parts(grid).items()}
    return tensors


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


def joined_parts(tensors: dict[str, Tensor], path: str, form: Form | None, experts: Sequence[int]) -> dict[str, Tensor]:
    """Parts of some experts of a linear, out of a shard's tensors, as a saved model holds them."""
    own = [{} for _ in experts]
    place = {str(expert): number for number, expert in enumerate(experts)}
    for name, tensor in tensors.items():
        if name.startswith(f"{path}.") and (found := name.removeprefix(f"{path}.").split("."))[0] in place:
            own[place[found[0]]][found[1]] = tensor
    if form is None:
        return {"weight": torch.stack([parts["weight"] for parts in own])}
    return joined(form, own, {part: tensors[f"{path}.{part}"] for part in SHARED if f"{path}.{part}" in tensors})


def dense_experts(tensors: dict[str, Tensor], path: str, form: Form | None, experts: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Some experts (E, R, C) of a linear on `device`, out of a shard's tensors."""
    parts = {part: tensor.to(device) for part, tensor in joined_parts(tensors, path, form, experts).items()}
    if form is None:
        return parts["weight"]
    whole_ERC = torch.empty(len(experts), form.rows, form.columns, dtype=dtype, device=device)
    for place in range(len(experts)):
        whole_ERC[place] = unpack(form, parts, place, dtype)
    return whole_ERC
