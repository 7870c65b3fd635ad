"""Bytes that a block takes, from its shape alone: what is kept while it is made, and what its stages need beside that.

Shapes: N tokens, C columns (in features), R rows (out features), D components, E experts.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.architectures import Architecture
from pipeline.config import Job
from pipeline.expansion import bytes_of_expert

LIBRARIES = 3 << 29  # of a GPU: the context, cuBLAS, cuSOLVER, cuML, kernels; 1.5 GiB


@dataclass(frozen=True)
class BlockShape:
    """`groups`: for each router the rows of its linears together, and their columns. `parameters`: of the dense block."""

    hidden: int
    groups: tuple[tuple[int, int], ...]
    parameters: int

    @property
    def expanded_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.groups)


def shape_of(block: nn.Module, architecture: Architecture) -> BlockShape:
    """`block`: dense, with or without its weights."""
    groups = []
    for group in architecture.router_groups:
        weights = [block.get_submodule(path).weight for path in group]
        groups.append((sum(len(weight) for weight in weights), weights[0].shape[1]))
    return BlockShape(groups[0][1], tuple(groups), sum(parameter.numel() for parameter in block.parameters()))


def activation_bytes(shape: BlockShape, tokens: int, dtype: torch.dtype) -> int:
    """Kept for an actor's own tokens: what enters the block, what attention gave, and the inputs of every router's linears."""
    return tokens * dtype.itemsize * (2 * shape.hidden + sum(columns for _, columns in shape.groups))


def expert_bytes(job: Job, shape: BlockShape, dtype: torch.dtype) -> int:
    """All experts of a block, as they are written: dense, zeros included."""
    return job.num_clusters * shape.expanded_parameters * dtype.itemsize


def working_bytes(job: Job, shape: BlockShape, tokens: int, dtype: torch.dtype) -> int:
    """What the stages need of the device at the least, beside the activations: the dense block, its experts, and either a router
    in the making or one expert being solved. tokens: of all actors."""
    return LIBRARIES + (shape.parameters * dtype.itemsize) + expert_bytes(job, shape, dtype) + max(
        max(bytes_of_expert(rows, columns), router_bytes(job, columns, tokens)) for rows, columns in shape.groups)


def router_bytes(job: Job, columns: int, tokens: int) -> int:
    """The projected tokens twice (ours, and what KMeans makes of them) or the sums that principal components take."""
    if job.num_clusters == 1:
        return 0
    dimensions = job.components(columns) or columns
    sums = 0 if job.no_pca else 8 * 4 * columns**2
    return max(2 * 4 * tokens * dimensions, sums)
