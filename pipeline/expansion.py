"""One block: inputs -> routers -> Hessians -> experts. Reads like the method.

    inputs  = tap(model, block, index, hidden, architecture)       what each router's linears read, from the dense block
    routing = fit_router(job, all tokens of that input)            PCA + KMeans
    experts = solve_experts(job, linears, tokens of each expert)   SparseGPT, batched
    routed  = routed_block(block, ...)                             the block with its experts, for the next block's inputs

Shapes: W windows, L tokens of a window, H hidden size, N tokens, C columns (in features), R rows (out features), E experts.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import routing
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.gram import hessian
from pipeline.modeling_sparse_expansion import RoutedLinear, expand, router_name
from pipeline.solver import Grid, find_grid, inverse_factor, solve

RouterGroups = tuple[tuple[str, ...], ...]


def tap(model: BlockwiseModel, block: nn.Module, index: int, hidden: dict[int, Tensor], groups: RouterGroups) -> list[dict[int, Tensor]]:
    """For each router, the inputs (N, C) of its linears by window group, in one pass of the dense block.

    The down projection is tapped in the same pass: it is fitted on what the dense gate and up produce, as published.
    """
    inputs: list[dict[int, Tensor]] = [{} for _ in groups]
    for number, hidden_WLH in hidden.items():
        def keep(tapped: dict[int, Tensor], number: int = number):
            return lambda _, args: tapped.__setitem__(number, args[0].reshape(-1, args[0].shape[-1]))

        hooks = [block.get_submodule(group[0]).register_forward_pre_hook(keep(tapped)) for group, tapped in zip(groups, inputs)]
        model.run(block, index, hidden_WLH)
        for hook in hooks:
            hook.remove()
    return inputs


def fit_router(job: Job, tokens_NC: Tensor) -> routing.Routing:
    components = job.components(tokens_NC.shape[1])
    return routing.fit(tokens_NC, job.num_clusters, components, job.kmeans_restarts, job.seed)


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


def solve_experts(job: Job, linears: dict[str, Tensor], experts: list[int], tokens: dict[int, list[Tensor]],
                  counts: list[int]) -> tuple[dict[str, Tensor], list[ExpertReport]]:
    """The sparse experts of linears that share an input.

    linears: dense weights (R, C) by path. tokens: for each of `experts`, its tokens in parts (N, C), in window order; for an
    expert that no token goes to, all tokens. counts: tokens of every expert. Returns weights (E, R, C) by path, in the
    linears' dtype and the order of `experts`.
    """
    rows = [len(weight) for weight in linears.values()]
    stacked_RC = torch.cat([weight.float() for weight in linears.values()])
    grid = _stacked_grid(job, linears.values()) if job.quantize else None
    pieces, reports = [], []
    waiting = _batches(experts, stacked_RC)
    while waiting:
        batch = waiting.pop(0)
        try:
            factor = inverse_factor(torch.stack([hessian(tokens[expert]) for expert in batch]))
            weight_ERC, loss_ER = solve(stacked_RC, factor, job.pattern, rows, grid)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            waiting[:0] = [batch[:len(batch) // 2], batch[len(batch) // 2:]]
            continue
        pieces.append(weight_ERC.to(next(iter(linears.values())).dtype))
        zeros_ER = (pieces[-1] == 0).sum(-1)
        for place, expert in enumerate(batch):
            reports.append(ExpertReport(
                expert, counts[expert], counts[expert] == 0, float(factor.damping_E[place]), int(factor.dead_EC[place].sum()),
                {path: int(zeros) / (count * stacked_RC.shape[1]) for path, zeros, count in zip(linears, _row_sums(zeros_ER[place], rows), rows)},
                {path: float(loss) for path, loss in zip(linears, _row_sums(loss_ER[place], rows))}))
    weights = torch.cat(pieces).split(rows, dim=1)
    return {path: weight_ERC.contiguous() for path, weight_ERC in zip(linears, weights)}, reports


def _row_sums(values_R: Tensor, rows: list[int]) -> list[Tensor]:
    return [part.sum() for part in values_R.split(rows)]


def _stacked_grid(job: Job, weights) -> Grid:
    grids = [find_grid(weight.float(), job.bits, job.group_size, job.symmetric, job.mse) for weight in weights]
    return Grid(torch.cat([grid.scale_RG for grid in grids]), torch.cat([grid.zero_RG for grid in grids]), grids[0].top, grids[0].width)


def _batches(experts: list[int], weight_RC: Tensor) -> list[list[int]]:
    """As many experts at a time as half of the free memory holds: six matrices of the Hessian's size, three of the weight's."""
    rows, columns = weight_RC.shape
    each = 4 * columns * (6 * columns + 3 * rows)
    free = torch.cuda.mem_get_info(weight_RC.device)[0] if weight_RC.is_cuda else 4 << 30
    size = max(1, min(len(experts), free // 2 // each))
    return [experts[start:start + size] for start in range(0, len(experts), size)]


class FixedRouter(nn.Module):
    """Routes calibration tokens by the labels of the fit, whatever their values have become, as published."""

    def __init__(self, labels_N: Tensor | None = None):
        super().__init__()
        self.labels_N = labels_N

    def experts_of(self, hidden: Tensor) -> Tensor:
        return self.labels_N


def routed_block(block: nn.Module, groups: RouterGroups, weights: dict[str, Tensor]) -> tuple[nn.Module, list[FixedRouter]]:
    """A copy of a dense block with experts (weights (E, R, C) by path of the linear), and its routers, one for each group,
    whose `labels_N` are to be set before every call."""
    shared = {id(parameter): parameter for parameter in block.parameters()}  # not copied
    routed = copy.deepcopy(block, shared)
    fixed = [FixedRouter() for _ in groups]
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
