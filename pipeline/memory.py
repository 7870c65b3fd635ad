"""Where the memory of a job goes, stage by stage, from sizes alone: what `plan` shows and what `run` refuses.

The stages are those of `actors.layer_shard`. On an H100 torch's own count of what it had allocated at the peak of a block agrees
within 6 %, with the allocator's expandable segments (tests/test_plan.py holds the figures).

Shapes: N tokens, C columns (in features), R rows (out features), D components, E experts, Q vectors that are iterated.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pipeline.config import Job
from pipeline.devices import CPU_BATCHES
from pipeline.expansion import bytes_of_expert
from pipeline.footprint import expert_bytes, working_bytes
from pipeline.gram import TOKENS_PER_PRODUCT, partial_sums
from pipeline.layout import PIECE, WRITERS
from pipeline.model_shape import ModelShape
from pipeline.packing import bytes_of_form
from pipeline.perplexity import LOGITS
from pipeline.principal import MORE, WHOLE
from pipeline.sampling import TOKENS_PER_BATCH
from pipeline.schedule import Task, assign, deal
from pipeline.windows import TOKENS_PER_GROUP

CONTEXT = 950_000_000  # of a GPU that CUDA's context, cuBLAS, cuSOLVER and cuML take without a tensor (H100: 0.83 GB without cuML)
PROCESS, GPU_PROCESS, DRIVER = 900_000_000, 3_000_000_000, 1_200_000_000  # of the host, that a process takes without a tensor
FACTOR = 2.4  # matrices of the Hessian's size that factoring an expert's Hessian takes at its peak, itself included
SOLVE = 1.65  # matrices of the weight's size, float32, that solving takes beside the factor, the result in 16 bits included
FULL = 5.2  # matrices of the covariance's size that its full decomposition takes beside itself
PROCESSES, WRITING = "actors", "a shard on its way to disk"  # parts of a node's memory
SKEW = 0.5  # KMeans' clusters are not alike: the smallest is taken to have so much of the mean, the largest as much more


@dataclass(frozen=True)
class Cluster:
    """What a job runs on. gpu_bytes: of an actor's share of its card; 0: actors compute on CPUs. host_bytes, store_bytes: memory and
    object store of each node. threads: of each actor. disk_bytes: free where shards and the model go; None: not known."""

    actors: int
    nodes: int
    gpu_bytes: int
    host_bytes: int
    store_bytes: int
    threads: int
    disk_bytes: int | None = None
    name: str = ""

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpu_bytes else "cpu"

    @property
    def actors_on_node(self) -> int:
        return -(-self.actors // self.nodes)


@dataclass(frozen=True)
class Work:
    """A job as far as sizes go. windows, length: of calibration. evaluation: windows judged; 0: none."""

    job: Job
    shape: ModelShape
    dtype: torch.dtype
    windows: int
    length: int
    evaluation: int
    evaluation_length: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    @property
    def sampled(self) -> list[tuple[int, int]]:
        """Windows and their tokens that the model is to write itself."""
        job, both = self.job, ((self.windows, self.length), (self.evaluation, self.evaluation_length))
        return [size for name, size in zip((job.dataset, job.eval_dataset or job.dataset), both) if name == "self" and size[0]]

    @property
    def cache_bytes(self) -> int:
        """Keys and values of windows that are sampled together; fewer where heads share them."""
        return 2 * TOKENS_PER_BATCH * self.shape.blocks * self.shape.attention * self.dtype.itemsize

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every router's linears."""
        return self.shape.block.groups

    def components(self, columns: int) -> int:
        """Dimensions of what KMeans clusters; 0: nothing is clustered."""
        return 0 if self.job.num_clusters == 1 else self.job.components(columns) or columns

    @property
    def expert_bytes(self) -> int:
        """Of a block's experts, unpacked."""
        return expert_bytes(self.job, self.shape.block, self.dtype)

    @cached_property
    def packed_bytes(self) -> int:
        """Of a block's experts, as they are written."""
        return sum(bytes_of_form(self.job, rows, columns, self.dtype) for rows, columns in self.groups)

    @property
    def packing(self) -> float:
        """Packed against unpacked."""
        return self.packed_bytes / self.expert_bytes

    @property
    def shard_bytes(self) -> int:
        """Of a layer's file: experts, routers, labels."""
        experts = self.job.num_clusters
        routers = sum(4 * experts * (columns + 1) for _, columns in self.groups)
        return self.packed_bytes + routers + len(self.groups) * self.tokens * (1 if experts <= 256 else 4)

    @property
    def model_bytes(self) -> int:
        """Of the saved model."""
        block = self.shape.block
        kept = (block.parameters - block.expanded_parameters) * self.dtype.itemsize
        routers = sum(4 * self.job.num_clusters * (columns + 1) for _, columns in self.groups)
        return self.shape.shell * self.dtype.itemsize + self.shape.blocks * (kept + routers + self.packed_bytes)


@dataclass(frozen=True)
class Shares:
    """Who has what, as the actors deal it."""

    work: Work
    cluster: Cluster

    @cached_property
    def group_tokens(self) -> list[int]:
        """Of every window group."""
        width = max(1, TOKENS_PER_GROUP[self.cluster.device_type] // self.work.length)
        return [min(width, self.work.windows - first) * self.work.length for first in range(0, self.work.windows, width)]

    @cached_property
    def own_groups(self) -> list[int]:
        """The window groups of the actor that has the most."""
        if self.work.job.propagation == "dense":
            return self.group_tokens
        return max(deal(self.group_tokens, self.cluster.actors), key=sum)

    @property
    def own_tokens(self) -> int:
        return sum(self.own_groups)

    @cached_property
    def own_evaluation(self) -> int:
        """Evaluation tokens of the actor that has the most."""
        width = max(1, TOKENS_PER_GROUP[self.cluster.device_type] // self.work.evaluation_length)
        groups = -(-self.work.evaluation // width)
        return min(self.work.evaluation, -(-groups // self.cluster.actors) * width) * self.work.evaluation_length

    @cached_property
    def nodes_of_sums(self) -> list[int]:
        """How many of the tree's sums each actor hands over."""
        class Sum:
            def add_(self, _):
                return self

        shares = deal(range(len(self.group_tokens)), 1 if self.work.job.propagation == "dense" else self.cluster.actors)
        return [len(partial_sums(lambda _: Sum(), share, len(self.group_tokens))) for share in shares]

    @cached_property
    def counts(self) -> list[list[int]]:
        """Tokens of every expert, unequal as KMeans' clusters are."""
        experts = self.work.job.num_clusters
        weights = [1 + SKEW * (2 * expert / (experts - 1) - 1) if experts > 1 else 1 for expert in range(experts)]
        return [[int(self.work.tokens * weight / experts) for weight in weights] for _ in self.work.groups]

    @cached_property
    def tasks(self) -> list[list[Task]]:
        """Whole experts by actor, dealt as the job will."""
        if self.work.job.propagation == "dense":
            return [[Task(router, tuple(range(self.work.job.num_clusters))) for router in range(len(self.work.groups))]] * self.cluster.actors
        return assign(self.counts, self.work.groups, self.cluster.actors)

    def weights_of(self, tasks: list[Task]) -> int:
        """Bytes of the experts of some tasks."""
        return sum(len(task.experts) * math.prod(self.work.groups[task.router]) for task in tasks) * self.work.dtype.itemsize

    @property
    def most_weights(self) -> int:
        """Bytes of the experts that one actor solves, at most."""
        return max(map(self.weights_of, self.tasks))


@dataclass(frozen=True)
class Memory:
    """Bytes of one actor's device (on a CPU: of its process), by stage and part. placed: where its activations lie."""

    stages: dict[str, dict[str, int]]
    placed: dict[str, int]

    def of(self, stage: str) -> int:
        return sum(self.stages[stage].values())

    @property
    def peak(self) -> str:
        """The stage that takes the most."""
        return max(self.stages, key=self.of)


def device_memory(work: Work, cluster: Cluster) -> Memory:
    """What an actor's device holds at the peak of every stage, with activations placed as --activations says."""
    shares = Shares(work, cluster)
    placed = _placed(work, cluster, shares)
    on_device = placed["device"] if cluster.gpu_bytes else placed["host"]
    base = {"context and libraries": CONTEXT if cluster.gpu_bytes else PROCESS, "weights outside the blocks": work.shape.shell * work.dtype.itemsize,
            "dense block": work.shape.block.parameters * work.dtype.itemsize, "activations": on_device}
    stages = {}

    def add(stage: str, experts: int, working: float, **other: int) -> None:
        stages[stage] = base | {"experts": experts} | other | {"work": int(working)}

    if work.sampled:  # the one stage that needs the whole model at once
        stages["sample"] = {"context and libraries": base["context and libraries"], "the whole model": work.shape.parameters * work.dtype.itemsize,
                            "work": work.cache_bytes}
    before = int(work.packing * shares.most_weights) if work.shape.blocks > 1 else 0  # of the block before, until they are written
    lent = _lent_bytes(work, cluster, shares)
    add("capture", before, _pass_bytes(work, cluster) + base["dense block"])
    if work.job.num_clusters > 1:
        add("cluster", before, max(_cluster_bytes(work, shares)), **_part(lent, "cluster"))
    made, working = _solve_peak(work, cluster, shares, sum(base.values()) + before + lent.get("solve", 0))
    add("solve", before + made, working, **_part(lent, "solve"))
    add("propagate", *_propagate_bytes(work, cluster, shares), **_part(lent, "propagate"))
    if work.job.propagation == "dense":
        del stages["propagate"]
    if work.evaluation:
        block = work.shape.block
        expanded = (block.parameters - block.expanded_parameters) * work.dtype.itemsize + int(work.expert_bytes * (1 + work.packing / sum(work.shape.linears)))  # unpacked one linear after the other
        hidden = shares.own_evaluation * work.shape.block.hidden * work.dtype.itemsize
        window = work.evaluation_length * work.shape.vocabulary
        at_a_time = min(max(1, LOGITS // window), max(1, TOKENS_PER_GROUP[cluster.device_type] // work.evaluation_length), work.evaluation)
        logits = window * (at_a_time * work.dtype.itemsize + 8)  # of one window in float32 too, twice
        stages["evaluate expanded"] = {name: base[name] for name in ("context and libraries", "weights outside the blocks")} | {
            "activations": hidden, "experts": expanded, "work": max(_routed_pass_bytes(work, cluster), logits)}
    return Memory(stages, placed)


def near(cluster: Cluster) -> bool:
    """Do actors lend each other GPU memory, rather than send it through the object store?"""
    return bool(cluster.gpu_bytes) and cluster.nodes == 1 and cluster.actors > 1


def _lent_bytes(work: Work, cluster: Cluster, shares: Shares) -> dict[str, int]:
    """Copies that an actor holds for others of its machine, by stage; nothing where they go through the object store."""
    if not near(cluster) or work.job.propagation == "dense":
        return {}
    points = sum(4 * shares.own_tokens * work.components(columns) for _, columns in work.groups)
    sums = 0 if work.job.no_pca or work.job.num_clusters == 1 else 4 * max(columns for _, columns in work.groups)**2 * max(shares.nodes_of_sums)
    tokens = shares.own_tokens * sum(columns for _, columns in work.groups) * work.dtype.itemsize * (1 - 1 / cluster.actors)
    return {"cluster": points + sums, "solve": int(tokens), "propagate": shares.most_weights}


def _part(lent: dict[str, int], stage: str) -> dict[str, int]:
    return {"lent to other actors": lent[stage]} if lent else {}


def least_device_memory(work: Work, cluster: Cluster) -> int:
    """What cannot be done without, with activations on disk and one expert solved at a time."""
    tight = replace(work, job=work.job.model_copy(update={"activations": "disk"}), evaluation=0)
    shares = Shares(tight, cluster)
    base = (CONTEXT if cluster.gpu_bytes else PROCESS) + (work.shape.shell + work.shape.block.parameters) * work.dtype.itemsize
    solving = max((1 + work.packing) * shares.weights_of(tasks[:number + 1]) + _bytes_of_one(*work.groups[task.router])
                  for tasks in shares.tasks for number, task in enumerate(tasks))
    propagating = sum(_propagate_bytes(tight, cluster, shares)) if work.job.propagation == "sparse" else 0
    clustering = max(_cluster_bytes(tight, shares)) if work.job.num_clusters > 1 else 0
    sampling = work.shape.parameters * work.dtype.itemsize if work.sampled else 0
    return int(max(base + max(solving, propagating, clustering, _pass_bytes(tight, cluster)), sampling))


def host_memory(work: Work, cluster: Cluster, device: Memory) -> dict[str, int]:
    """Bytes of the fullest node's memory beside the object store, by part: its actors' and the driver's."""
    actors = cluster.actors_on_node
    writing = {"driver": DRIVER, WRITING: actors * WRITERS * PIECE}
    if not cluster.gpu_bytes:
        return {PROCESSES: actors * device.of(device.peak)} | writing
    block = 2 * work.shape.block.parameters * work.dtype.itemsize  # as it was read and as it is sent
    return {PROCESSES: actors * (GPU_PROCESS + block), "activations": actors * device.placed["host"]} | writing


def store_bytes(work: Work, cluster: Cluster) -> dict[str, int]:
    """Bytes of the fullest node's object store, by stage."""
    shares, actors = Shares(work, cluster), cluster.actors
    block = work.shape.block.parameters * work.dtype.itemsize
    elsewhere = 1 - 1 / actors
    points = sum(4 * work.tokens * work.components(columns) for _, columns in work.groups)
    sums = max(4 * sum(shares.nodes_of_sums) * columns**2 for _, columns in work.groups) if not work.job.no_pca and work.job.num_clusters > 1 else 0
    exchanged = sum(columns for _, columns in work.groups) * work.dtype.itemsize * work.tokens * elsewhere
    experts = work.packed_bytes if actors > 1 else 0
    if work.job.propagation == "dense":
        return {"dense pass": work.tokens * work.shape.block.hidden * work.dtype.itemsize if actors > 1 else 0, "expand": 0}
    return {"capture": 2 * block, "cluster": int(sums + points), "solve": int(exchanged * min(1, 2 / cluster.nodes)), "propagate": experts}


def disk_bytes(work: Work, device: Memory, actors: int) -> dict[str, int]:
    """Bytes in the run directory. actors: whose activations lie there."""
    return {"shards": 0 if work.job.storage else work.shape.blocks * work.shard_bytes, "model": work.model_bytes, "activations": actors * device.placed["disk"]}


def _placed(work: Work, cluster: Cluster, shares: Shares) -> dict[str, int]:
    """Bytes of an actor's activations by place: as `Shelf` puts them, the first ones first."""
    hidden, itemsize = work.shape.block.hidden, work.dtype.itemsize
    by_group = [tokens * hidden * itemsize for tokens in shares.own_groups]
    sizes = [*by_group, *(shares.own_tokens * columns * itemsize for _, columns in work.groups), *by_group]
    free = cluster.gpu_bytes - CONTEXT - working_bytes(work.job, work.shape.block, work.tokens, work.dtype)
    room = {"device": max(0, free), "host": cluster.host_bytes / 2 / cluster.actors_on_node}
    if work.job.activations != "auto":
        room = {"device": math.inf if work.job.activations == "device" else 0, "host": 0 if work.job.activations == "disk" else math.inf}
    room |= {"disk": math.inf} | ({} if cluster.gpu_bytes else {"device": 0})
    placed = dict.fromkeys(room, 0)
    for size in sizes:
        place = next(place for place in room if size <= room[place])
        room[place] -= size
        placed[place] += size
    return placed


def _group(work: Work, cluster: Cluster) -> int:
    """Bytes of one feature of a window group."""
    return max(Shares(work, cluster).group_tokens) * work.dtype.itemsize


def _pass_bytes(work: Work, cluster: Cluster) -> int:
    """Of a dense pass up to the down projection."""
    (rows, hidden), (_, wide) = work.groups
    return _group(work, cluster) * (rows + wide + 2 * hidden)


def _routed_pass_bytes(work: Work, cluster: Cluster) -> int:
    (rows, hidden), (_, wide) = work.groups
    return _group(work, cluster) * (rows + 3 * wide + 3 * hidden)


def _cluster_bytes(work: Work, shares: Shares) -> list[int]:
    """Of each step towards a router: sums over own tokens, decomposition of everybody's, projection, KMeans."""
    found, held = [], 0
    for _, columns in work.groups:
        dimensions, square = work.components(columns), 4 * columns**2
        if not work.job.no_pca:
            levels = math.ceil(math.log2(max(1, len(shares.own_groups))))
            found.append(square * (levels + 1.25))
            vectors = dimensions * MORE + 16
            by_iteration = columns > WHOLE and dimensions * MORE < columns / 2
            found.append(square * (levels + 1.25) + (16 * columns * vectors if by_iteration else FULL * square))
            found.append(2 * 4 * shares.own_tokens * dimensions + 4 * TOKENS_PER_PRODUCT * columns)
        points = 4 * work.tokens * dimensions
        found.append(held + 2 * points)  # as they came, and brought together
        held += points  # until all routers are known
    return [int(bytes_) for bytes_ in found]


def _bytes_of_one(rows: int, columns: int) -> int:
    """What an expert of a batch really takes while it is solved."""
    square = 4 * columns**2
    return int(max(FACTOR * square, square + SOLVE * 4 * rows * columns))


def _solve_peak(work: Work, cluster: Cluster, shares: Shares, held: int) -> tuple[int, int]:
    """Bytes of the experts made and of what solving takes, where both together are the most. held: of everything else."""
    best = (0, 0)
    for tasks in shares.tasks:
        for number, task in enumerate(tasks):
            rows, columns = work.groups[task.router]
            made = int((1 + work.packing) * shares.weights_of(tasks[:number + 1]))
            if work.job.propagation == "dense":  # what is packed is not kept otherwise
                made -= shares.weights_of(tasks[:number])
            stacked = 4 * rows * columns
            free = cluster.gpu_bytes - held - made - stacked if cluster.gpu_bytes else CPU_BATCHES
            batch = max(1, min(len(task.experts), int(free) // 2 // bytes_of_expert(rows, columns)))
            best = max(best, (made, stacked + batch * _bytes_of_one(rows, columns)), key=sum)
    return best


def _propagate_bytes(work: Work, cluster: Cluster, shares: Shares) -> tuple[int, int]:
    """All experts of the block, and beside them this actor's own, packed and, where they are not all, unpacked; and the pass."""
    own = shares.most_weights * (work.packing + (cluster.actors > 1))
    return work.expert_bytes + int(own), _routed_pass_bytes(work, cluster)
