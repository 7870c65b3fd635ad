"""A saved model for tools that know nothing of experts: the dense architecture, with one expert's weights, zeros included."""

import shutil
from pathlib import Path

import torch

from pipeline.assembly import copy_companions
from pipeline.blocks import BlockwiseModel
from pipeline.errors import UserError
from pipeline.files import MARK
from pipeline.saved_model import demand_whole, saved_config
from pipeline.weights import CheckpointWriter

MEAN = "mean"


def export(directory: Path, target: Path, expert: str | None) -> dict:
    """Write `target`, whole or not at all. expert: its number in every linear, or "mean", of all of them; may be left out of a
    model with one expert, which stays the same model. Raises UserError."""
    config = saved_config(directory)
    chosen = _chosen(expert, config.num_experts)
    if target.exists():
        raise UserError(f"--output-dir {target} is there already; give a new directory.")
    demand_whole(directory)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    model = BlockwiseModel(directory, dtype, torch.device("cpu"))
    temporary = target.with_name(f"{target.name}{MARK}new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    written = CheckpointWriter(temporary, model.num_blocks + 1)
    written.write({name.removeprefix("model."): tensor for name, tensor in model.shell_weights().items()})
    paths = {path for group in config.router_groups for path in group}
    zeros = weights = 0
    for index in range(model.num_blocks):
        tensors = {}
        for name, tensor in model.load_block(index).state_dict().items():
            path, _, kind = name.rpartition(".")
            if path.endswith("_router"):
                continue
            if path in paths and kind == "weight":
                tensor = tensor.float().mean(0).to(dtype) if chosen is None else tensor[chosen]
                zeros, weights = zeros + int((tensor == 0).sum()), weights + tensor.numel()
            tensors[f"{config.blocks}.{index}.{name}"] = tensor.contiguous()
        written.write(tensors)
    written.finish()
    text_config = config.text_config
    text_config.dtype = str(config.dtype).removeprefix("torch.")
    text_config.save_pretrained(temporary)
    copy_companions(directory, temporary)
    temporary.rename(target)
    return {"directory": str(target), "expert": MEAN if chosen is None else chosen, "of": config.num_experts, "bytes": written.total, "sparsity": zeros / weights}


def describe_export(result: dict) -> str:
    what = "the mean of the experts" if result["expert"] == MEAN else f"expert {result['expert']}"
    same = "" if result["of"] == 1 else f" of {result['of']} in every linear: another model than the expanded one, which no dense one can be"
    return f"{result['directory']}: dense, with {what}{same}. {result['sparsity']:.2%} of the feed-forward weights are 0; {result['bytes'] / 1e6:.1f} MB."


def _chosen(expert: str | None, experts: int) -> int | None:
    """None: the mean."""
    allowed = f"a number from 0 to {experts - 1}, or {MEAN}" if experts > 1 else f"0, or {MEAN}"
    if expert is None:
        if experts > 1:
            raise UserError(f"The model has {experts} experts in every linear, and a dense one has room for one; give --expert, {allowed}.")
        return 0
    if expert == MEAN:
        return None
    if not expert.isdecimal() or int(expert) >= experts:
        raise UserError(f"--expert is {expert}; allowed is {allowed}.")
    return int(expert)
