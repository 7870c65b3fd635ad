"""Who does what: shares of a list, and the experts of a block dealt to actors so that all are busy for as long."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """Experts of one router's linears that one actor solves together."""

    router: int
    experts: tuple[int, ...]


def deal(items: Sequence, shares: int) -> list:
    """Consecutive, nearly equal shares."""
    return [items[len(items) * share // shares:len(items) * (share + 1) // shares] for share in range(shares)]


def expert_cost(tokens: int, rows: int, columns: int) -> float:
    """Multiply-adds of an expert: its Hessian (a symmetric sum: half), factor and inverse, and the solve of all its rows."""
    return tokens * columns**2 / 2 + columns**3 / 3 + rows * columns**2 / 2


def assign(counts: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]], actors: int) -> list[list[Task]]:
    """Tasks by actor: the costliest expert first, each to the actor that has the least to do (Graham's rule).

    counts: for each router the tokens of each expert. shapes: for each router (rows of its linears together, columns). An
    expert without tokens is solved on all of them.
    """
    experts = sorted((-expert_cost(tokens or sum(by_expert), *shapes[router]), router, expert)
                     for router, by_expert in enumerate(counts) for expert, tokens in enumerate(by_expert))
    load, dealt = [0.0] * actors, [[[] for _ in counts] for _ in range(actors)]
    for cost, router, expert in experts:
        actor = load.index(min(load))
        load[actor] -= cost
        dealt[actor][router].append(expert)
    return [[Task(router, tuple(sorted(found))) for router, found in enumerate(routers) if found] for routers in dealt]


def in_order(tasks: Sequence[Task], found: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """A block's experts (E, R, C) by path on `device`, from those of its tasks, which may lie elsewhere: each is copied to its place."""
    experts_of: dict[int, int] = {}
    for task in tasks:
        experts_of[task.router] = experts_of.get(task.router, 0) + len(task.experts)
    whole: dict[str, Tensor] = {}
    for task, weights in zip(tasks, found):
        for path, weight_ERC in weights.items():
            if len(task.experts) == experts_of[task.router]:  # all of them, in order
                whole[path] = weight_ERC.to(device)
                continue
            if path not in whole:
                whole[path] = torch.empty(experts_of[task.router], *weight_ERC.shape[1:], dtype=weight_ERC.dtype, device=device)
            for expert, weight_RC in zip(task.experts, weight_ERC):
                whole[path][expert].copy_(weight_RC)
    return whole


def in_groups(items: Sequence, key: Callable[..., Hashable]) -> list[list[int]]:
    """The places of items of equal key, by key."""
    found: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault(key(item), []).append(place)
    return list(found.values())
