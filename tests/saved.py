"""Saved models of the embedded one, made in a moment: experts are its weights with noise, pruned by magnitude, and routers are random."""

from pathlib import Path

import torch

from pipeline.architectures import architecture_of
from pipeline.assembly import Assembly, assemble
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.demo import DEMO_MODEL
from pipeline.packing import forms_of
from pipeline.shard import expert_tensors, router_tensors
from pipeline.solver.quantizer import Grid, find_grid
from pipeline.storage import Storage


def make_saved(folder: Path, dtype: str = "float32", **options) -> Path:
    """options: of the job. Returns the saved model's directory."""
    job = Job(model="demo", **options)
    architecture, generator = architecture_of("gpt_neox", ""), torch.Generator().manual_seed(0)
    model, storage = BlockwiseModel(DEMO_MODEL, torch.float32, torch.device("cpu")), Storage(str(folder / "run"))
    for index in range(model.num_blocks):
        block, weights, grids, routers = model.load_block(index), {}, {}, []
        for group in architecture.router_groups:
            for path in group:
                dense_RC = block.get_submodule(path).weight
                if job.quantize:
                    grids[path] = find_grid(dense_RC, job.bits, job.group_size, job.symmetric, job.mse)
                noise = 0.05 * dense_RC.std()
                experts = [_made(dense_RC + noise * torch.randn(dense_RC.shape, generator=generator), job, grids.get(path)) for _ in range(job.num_clusters)]
                weights[path] = torch.stack(experts).to(getattr(torch, dtype))
            columns = block.get_submodule(group[0]).in_features
            router = {"weight": torch.randn(job.num_clusters, columns, generator=generator), "bias": torch.zeros(job.num_clusters)}
            routers.append((router, torch.zeros(8, dtype=torch.int32)))
        forms = forms_of(job, {path: weight_ERC[0] for path, weight_ERC in weights.items()}, getattr(torch, dtype))
        tensors = expert_tensors(forms, range(job.num_clusters), weights, grids)
        storage.write(index, tensors | router_tensors(architecture.router_groups, routers, job.num_clusters))
    assemble(Assembly(DEMO_MODEL, storage, job, architecture.router_groups, architecture.blocks, dtype, {"dense_model": "demo"}), folder / "model", lambda _: None)
    return folder / "model"


def _made(weight_RC: torch.Tensor, job: Job, grid: Grid | None) -> torch.Tensor:
    pattern, magnitude = job.pattern, weight_RC.abs()
    if pattern.is_n_of_m:
        grouped = magnitude.unflatten(1, (-1, pattern.m))
        kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, grouped.topk(pattern.n).indices, True).flatten(1)
    else:
        kept = magnitude >= magnitude.flatten().kthvalue(int(pattern.fraction * magnitude.numel()) + 1).values
    if grid is not None:
        spread = lambda part_RG: part_RG.repeat_interleave(grid.width, 1)[:, :weight_RC.shape[1]]  # noqa: E731
        level = (weight_RC / spread(grid.scale_RG)).round().add(spread(grid.zero_RG)).clamp(0, grid.top)
        weight_RC = spread(grid.scale_RG) * (level - spread(grid.zero_RG))
    return weight_RC.masked_fill(~kept, 0)
