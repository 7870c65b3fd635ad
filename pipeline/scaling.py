"""Predicted seconds of making all experts on more and more GPUs: a model of the schedule, not a measurement beyond one GPU.

What does not get faster with more actors is in it: decomposition of each router by one actor, everybody fetching all projected tokens and all
experts, rounds of KMeans, whole experts dealt by `schedule.assign`, whole groups of windows, one writer a block.
"""

import math
from dataclasses import dataclass, replace

from pipeline.estimate import estimate
from pipeline.memory import Cluster, Work
from pipeline.rates import Rates

GIB = 1 << 30
CARD, NODE, STORE = 85 * 10**9, 2000 * GIB, 600 * GIB  # bytes of a card of 80 GB, of a node's memory and of its object store
GPUS_OF_A_NODE = 8
MAKING = ("capture", "cluster", "solve", "propagate", "write", "dense pass", "expand")  # the stages that make experts


@dataclass(frozen=True)
class Point:
    """`fits`: into the cards, with activations wherever there is room."""

    gpus: int
    seconds: float
    fits: bool
    stages: dict[str, float]


def predicted(work: Work, rates: Rates, counts: tuple[int, ...], writing: bool = True) -> list[Point]:
    """On machines of 8 GPUs. writing: False leaves the time of the shards' disk out: what computing and exchange alone would take."""
    if not writing:
        rates = replace(rates, file=math.inf, hash=math.inf)
    points = []
    for gpus in counts:
        cluster = Cluster(gpus, -(-gpus // GPUS_OF_A_NODE), CARD, NODE, STORE, 8)
        plan = estimate(work, cluster, rates)
        stages = {name: stage.seconds for name, stage in plan.stages.items() if name in MAKING}
        points.append(Point(gpus, sum(stages.values()), plan.least <= CARD, stages))
    return points
