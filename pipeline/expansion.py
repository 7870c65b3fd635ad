"""One block: inputs -> routers -> Hessians -> experts -> the next block's inputs. Reads like the method.

    captured = capture(model, block, index, hidden, architecture, shelf)     what each router's linears read, from the dense block
    routing  = fit_router(job, captured.inputs[router].tensor, sizes, device)    PCA + KMeans
    tokens   = TokensByExpert(captured.inputs[router].tensor, labels, ...)   sorted once
    experts  = solve_experts([job], linears, [0, 1, ...], tokens.of, counts) SparseGPT, batched
    propagate(model, block, index, hidden, architecture, experts, ...)       the block with its experts; `hidden` becomes its outputs

Activations are `Kept`: they lie on the device, in host memory or on disk, and come to the device piece by piece.

Shapes: W windows, L tokens of a window, H hidden size, N tokens, C columns (in features), R rows (out features), E experts.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import routing
from pipeline.activations import Kept, Shelf
from pipeline.architectures import Architecture
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.devices import free_memory
from pipeline.gram import Tokens, hessian
from pipeline.modeling_sparse_expansion import RoutedLinear, expand, router_name
from pipeline.solver import Grid, find_grid, inverse_factor, solve


@dataclass
class Captured:
    """What a pass of the dense block leaves. `inputs`: for each router its linears' inputs (N, C), in window order.
    `attention`: by window group what the attention returned, which is the same when the experts run. `outputs`: by window
    group what leaves the block. One of the two, or neither, is kept."""

    inputs: list[Kept]
    attention: dict[int, Kept]
    outputs: dict[int, Kept]


class _Tapped(Exception):
    """All inputs are known; what the block would go on to compute is not wanted."""


def capture(model: BlockwiseModel, block: nn.Module, index: int, hidden: dict[int, Kept], architecture: Architecture, shelf: Shelf,
            besides: str = "attention") -> Captured:
    """One pass of the dense block for every window group (W, L, H) of `hidden`, up to the down projection, whose input it taps
    too: that one is fitted on what the dense gate and up produce, as published. What is captured is kept on the shelf. besides:
    "attention", "outputs" or "": what else is kept; for the outputs the pass goes on to the end."""
    groups = architecture.router_groups
    tokens = sum(kept.tensor.shape[:2].numel() for kept in hidden.values())
    captured = Captured([shelf.keep(f"inputs of router {router}", (tokens, block.get_submodule(group[0]).in_features), model.dtype)
                         for router, group in enumerate(groups)], {}, {})
    done, number, reached = 0, -1, set()

    def keep(router: int):
        def hook(_, args):
            tapped_NC = args[0].reshape(-1, args[0].shape[-1])
            captured.inputs[router].tensor[done:done + len(tapped_NC)] = tapped_NC
            if router == len(groups) - 1:
                reached.add(number)
                if besides != "outputs":
                    raise _Tapped
        return hook

    def keep_attention(_, args, output):
        # Attention returns its output and, from some implementations, its large matrix of weights, which nobody reads.
        captured.attention[number] = shelf.put(f"attention of group {number}", output[0])

    hooks = [block.get_submodule(group[0]).register_forward_pre_hook(keep(router)) for router, group in enumerate(groups)]
    if besides == "attention":
        hooks.append(block.get_submodule(architecture.attention).register_forward_hook(keep_attention))
    try:
        for number, kept in hidden.items():
            with contextlib.suppress(_Tapped):
                captured.outputs[number] = shelf.put(f"outputs of group {number}", model.run(block, index, kept.tensor))
                captured.outputs[number].at = index + 1
            done += kept.tensor.shape[:2].numel()
    finally:
        for hook in hooks:
            hook.remove()
    assert reached == set(hidden), "the last router's linear did not run"
    return captured


def fit_router(job: Job, tokens_NC: Tensor, sizes: Sequence[int], device: torch.device) -> routing.Routing:
    components = job.components(tokens_NC.shape[1])
    return routing.fit(tokens_NC, job.num_clusters, components, job.kmeans_restarts, job.seed, sizes, device)


class TokensByExpert:
    """Tokens (N, C) sorted by their experts once, each expert's in window order."""

    def __init__(self, tokens_NC: Tensor, labels_N: Tensor, num_experts: int):
        self._tokens_NC = tokens_NC
        self._order_N = labels_N.to(tokens_NC.device).argsort(stable=True)
        self._ends = [0, *torch.bincount(labels_N.long(), minlength=num_experts).cumsum(0).tolist()]

    def of(self, expert: int) -> Tensor:
        if self._ends[expert + 1] - self._ends[expert] == len(self._tokens_NC):
            return self._tokens_NC
        return self._tokens_NC[self._order_N[self._ends[expert]:self._ends[expert + 1]]]


@dataclass
class ExpertReport:
    """What happened to one expert of one router's linears; becomes a row of stats/experts.parquet."""

    expert: int
    tokens: int
    fallback: bool  # an empty cluster: solved on all of the layer's tokens
    damping: float  # share of the mean diagonal that was added
    dead_columns: int
    sparsity: dict[str, float]  # by linear
    loss: dict[str, float]  # by linear: 2/n squared output error on the expert's tokens, summed over rows


@dataclass
class Solved:
    """Experts of some linears: weights (E, R, C) and the grid of their codes (with quantization) by path, a report for each expert."""

    weights: dict[str, Tensor]
    grids: dict[str, Grid]
    reports: list[ExpertReport]


def solve_experts(jobs: Sequence[Job], linears: dict[str, Tensor], experts: list[int], tokens_of: Callable[[int], Tokens],
                  counts: list[int]) -> list[Solved]:
    """The sparse experts of linears that share an input.

    jobs: whose experts are made of the same tokens, so that Hessians and factors serve them all; they may differ in
    sparsity and bits. linears: dense weights (R, C) by path. tokens_of: the tokens (N, C) of an expert, in window order, or
    parts of them; for an expert that no token goes to, all tokens. counts: tokens of every expert. Returns each job's, with
    weights in the linears' dtype and everything in the order of `experts`.
    """
    rows = [len(weight) for weight in linears.values()]
    stacked_RC = torch.cat([weight.float() for weight in linears.values()])
    grids = [{path: find_grid(weight.float(), job.bits, job.group_size, job.symmetric, job.mse) for path, weight in linears.items()} if job.quantize else {}
             for job in jobs]
    stacked = [_stacked(list(found.values())) if found else None for found in grids]
    dtype = next(iter(linears.values())).dtype
    weights = [{path: weight.new_empty(len(experts), *weight.shape) for path, weight in linears.items()} for _ in jobs]
    reports: list[list[ExpertReport]] = [[] for _ in jobs]

    def solve_batch(first: int, batch: list[int]) -> None:
        factor = inverse_factor(_hessians(batch, tokens_of, stacked_RC))  # not kept: as large as the factor
        for job, grid, made, told in zip(jobs, stacked, weights, reports):
            weight_ERC, loss_ER = solve(stacked_RC, factor, job.pattern, rows, grid, dtype)
            parts = dict(zip(linears, weight_ERC.split(rows, dim=1)))
            for path, part_ERC in parts.items():
                made[path][first:first + len(batch)] = part_ERC
            zeros = {path: (part_ERC == 0).sum(dim=(1, 2)).tolist() for path, part_ERC in parts.items()}
            losses = {path: part_ER.sum(1).tolist() for path, part_ER in zip(linears, loss_ER.split(rows, dim=1))}
            del told[first:]  # of an attempt that ran out of memory
            told.extend(
                ExpertReport(expert, counts[expert], counts[expert] == 0, damping, dead, {path: count[place] / linears[path].numel() for path, count in zeros.items()},
                             {path: loss[place] for path, loss in losses.items()})
                for place, (expert, damping, dead) in enumerate(zip(batch, factor.damping_E.tolist(), factor.dead_EC.sum(1).tolist())))

    waiting, first = _batches(experts, stacked_RC), 0
    while waiting:
        batch = waiting.pop(0)
        try:
            solve_batch(first, batch)
            first += len(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            waiting[:0] = [batch[:len(batch) // 2], batch[len(batch) // 2:]]
    return [Solved(*found) for found in zip(weights, grids, reports)]


def _hessians(experts: list[int], tokens_of: Callable[[int], Tokens], weight_RC: Tensor) -> Tensor:
    columns = weight_RC.shape[1]
    hessian_ECC = weight_RC.new_empty(len(experts), columns, columns)
    for place, expert in enumerate(experts):
        hessian_ECC[place] = hessian(tokens_of(expert), weight_RC.device)
    return hessian_ECC


def _stacked(grids: list[Grid]) -> Grid:
    return Grid(torch.cat([grid.scale_RG for grid in grids]), torch.cat([grid.zero_RG for grid in grids]), grids[0].top, grids[0].width)


def _batches(experts: list[int], weight_RC: Tensor) -> list[list[int]]:
    """As many experts at a time as half of the free memory holds."""
    rows, columns = weight_RC.shape
    size = max(1, min(len(experts), free_memory(weight_RC.device) // 2 // bytes_of_expert(rows, columns)))
    return [experts[start:start + size] for start in range(0, len(experts), size)]


def bytes_of_expert(rows: int, columns: int) -> int:
    """What solving takes for each expert of a batch: four matrices of the Hessian's size, three of the weight's, float32."""
    return 4 * columns * (4 * columns + 3 * rows)


class FixedRouter(nn.Module):
    """Routes calibration tokens by the labels of the fit, whatever their values have become, as published."""

    def __init__(self, labels_N: Tensor | None = None):
        super().__init__()
        self.labels_N = labels_N

    def experts_of(self, hidden: Tensor) -> Tensor:
        return self.labels_N


def routed_block(block: nn.Module, architecture: Architecture, weights: dict[str, Tensor]) -> tuple[nn.Module, list[FixedRouter]]:
    """A copy of a dense block with experts (weights (E, R, C) by path of the linear), and its routers, one for each group,
    whose `labels_N` are to be set before every call."""
    groups = architecture.router_groups
    shared = {id(parameter): parameter for parameter in block.parameters()}  # not copied
    routed = copy.deepcopy(block, shared)
    fixed = [FixedRouter() for _ in groups]
    with torch.device("meta"):  # its weights are about to be replaced
        expand(routed, [list(group) for group in groups], len(next(iter(weights.values()))))
    for group, router in zip(groups, fixed):
        for path in group:
            linear: RoutedLinear = routed.get_submodule(path)
            linear._router = [router]
            linear.weight = nn.Parameter(weights[path], requires_grad=False)
            if linear.bias is not None:
                linear.bias = block.get_submodule(path).bias
        parent_path, _, name = router_name(list(group)).rpartition(".")
        delattr(routed.get_submodule(parent_path), name)
    return routed, fixed


def propagate(model: BlockwiseModel, block: nn.Module, index: int, hidden: dict[int, Kept], architecture: Architecture,
              weights: dict[str, Tensor], labels: list[Tensor], attention: dict[int, Kept] | None = None) -> None:
    """Replace every window group of `hidden` that is at this block by the output of the block with its experts.

    labels: for each router the expert (N) of all these tokens, in window order. attention: `Captured.attention`, where the
    block has been captured on the same inputs.
    """
    routed, routers = routed_block(block, architecture, weights)
    done = 0
    for number, kept in hidden.items():
        tokens = kept.tensor.shape[:2].numel()
        if kept.at == index:
            for router, labels_N in zip(routers, labels):
                router.labels_N = labels_N[done:done + tokens].long()
            if attention is not None:
                known = attention[number].tensor.to(model.device)
                routed.get_submodule(architecture.attention).forward = lambda *_, known=known, **__: (known, None)
            kept.tensor.copy_(model.run(routed, index, kept.tensor))
            kept.at = index + 1
        done += tokens


def advance(model: BlockwiseModel, block: nn.Module, index: int, hidden: dict[int, Kept]) -> None:
    """Replace every window group of `hidden` that is at this block by the output of the dense block."""
    for kept in hidden.values():
        if kept.at == index:
            kept.tensor.copy_(model.run(block, index, kept.tensor))
            kept.at = index + 1
