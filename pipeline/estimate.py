"""What a job takes, before anything is loaded: seconds, memory, disk and transfers by stage.

    plan = estimate(work, cluster, rates)
    plan.seconds, plan.device.of(plan.device.peak), plan.disk

A model of what the actors do (`actors.sparse_propagation`, `actors.dense_propagation`), with their own `schedule` and `Tournament`:
operations at the device's rate for a product times a measured efficiency, and small steps that a GPU takes as long for whatever their
size. The efficiencies are this project's measurements (tests/benchmarks/results); they hold for one H100 and for two CPU cores.

Shapes: N tokens, C columns (in features), R rows (out features), D components, E experts, Q vectors that are iterated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pipeline.memory import PROCESSES, WRITING, Cluster, Memory, Shares, Work, device_memory, disk_bytes, host_memory, least_device_memory, near, store_bytes
from pipeline.principal import MORE, WHOLE
from pipeline.rates import CLUSTERS, Rates
from pipeline.routing import LAST_STEPS, Entry, Run, Tournament
from pipeline.sampling import TOKENS_PER_BATCH
from pipeline.solver.factor import LEAF
from pipeline.solver.solve import BLOCK

# Shares of the rate of a large product that are reached: by passes of a block; by sums of x x^T, counting N C^2; by factors, counting 2/3 C^3.
PASS, SUMS16, SUMS32, FACTOR = 0.6, 0.4, 0.7, {"cpu": 0.25, "cuda": 0.75}
# Small steps of a GPU: for a leaf of a factor, for a block of columns, for 4096 tokens of a sum, for a column of a decomposition.
LEAF_STEPS, BLOCK_STEPS, CHUNK_STEPS, COLUMN_STEPS = 10, 2, 1.8, 0.11
ITERATIONS = 10  # of the leading axes
COLUMN_PASSES = 70  # over a block's weights, float32, while its columns are solved
TOKENS_PER_CHUNK = 4096
SAMPLED_STEPS, STEPS = 25, 60  # that a KMeans run takes to its end, over a sample and over all tokens
BLOCK_CALLS, CPU_STEP = 4, 1e-4  # of one token through a block: steps, and seconds of one on a CPU
PACK = 20  # passes over an expert while it is packed
CALL = 0.005  # seconds until an actor begins what it is asked
SEEN_AS = {"expand": "solve", "dense pass": "capture", "write": "solve", "evaluate dense": "evaluate expanded"}  # whose memory a stage has
START = {"cpu": 10.0, "cuda": 20.0}  # Ray, actors, libraries; most of it imports
LENT = 1.5e11  # bytes/s from another GPU of the machine, over NVLink, the opening of what is lent included
READS = 5  # times that a block's stages read or write what is kept


@dataclass(frozen=True)
class Stage:
    """Seconds of the whole job; bytes at the stage's peak: of an actor's device, of the fullest node's memory, and of its object store.
    moved, disk: bytes handed to the object store and left on disk, of the whole job."""

    seconds: float
    device: int
    host: int
    store: int
    moved: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """`host`, `disk`: bytes by part; of the fullest node, and where shards and the model go. least: bytes of a device that the job
    cannot do without."""

    work: Work
    cluster: Cluster
    rates: Rates
    stages: dict[str, Stage]
    device: Memory
    host: dict[str, int]
    disk: dict[str, int]
    least: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())


def estimate(work: Work, cluster: Cluster, rates: Rates) -> Plan:
    device = device_memory(work, cluster)
    timing = Timing(work, cluster, rates, device)
    seconds = timing.dense() if work.job.propagation == "dense" else timing.sparse()
    store, moved, host, disk = store_bytes(work, cluster), timing.moved(), host_memory(work, cluster, device), disk_bytes(work, device, cluster.actors_on_node)
    left = {"capture": disk["activations"], "write": disk["shards"], "expand": disk["shards"] + disk["activations"], "assemble": disk["model"]}
    stages = {}
    for stage, value in seconds.items():
        known = SEEN_AS.get(stage, stage)
        on_device = device.of(known) if known in device.stages else 0
        on_host = host[PROCESSES] + host["activations"] if cluster.gpu_bytes else cluster.actors_on_node * on_device
        on_host += host["driver"] + (host[WRITING] if stage in ("write", "expand") else 0)
        stages[stage] = Stage(value, on_device, on_host, store.get(stage, 0), moved.get(stage, 0), left.get(stage, 0))
    return Plan(work, cluster, rates, stages, device, host, disk, least_device_memory(work, cluster))


def compared(plan: Plan, seconds_by_stage: dict[str, float]) -> list[tuple[str, float, float]]:
    """Stage, seconds predicted, seconds measured, of a job's result; the last row is their sum, over the stages that both know."""
    rows = [(name, stage.seconds, seconds_by_stage[name]) for name, stage in plan.stages.items() if name in seconds_by_stage]
    return [*rows, ("sum", sum(row[1] for row in rows), sum(row[2] for row in rows))]


@dataclass(frozen=True)
class Timing:
    work: Work
    cluster: Cluster
    rates: Rates
    device: Memory

    @cached_property
    def shares(self) -> Shares:
        return Shares(self.work, self.cluster)

    # Whole jobs: seconds by stage

    def sparse(self) -> dict[str, float]:
        blocks, own = self.work.shape.blocks, self.shares.own_tokens
        spilled = self._spilled()
        capture = self._pass(own, routed=False) + self._load() + spilled + CALL
        cluster = 3 * spilled + self.cluster_seconds() if self.work.job.num_clusters > 1 else CALL
        solve = spilled + self.solve_seconds() + 2 * CALL
        propagate = self.propagate_seconds() + CALL
        write = self.write_seconds()
        return self._around({
            "capture": blocks * capture, "cluster": blocks * cluster, "solve": blocks * solve, "propagate": blocks * propagate,
            # Beside the blocks that follow, but for the last.
            "write": write + (blocks - 1) * max(0.0, write - capture - cluster - solve),
        })

    def dense(self) -> dict[str, float]:
        work, actors, blocks = self.work, self.cluster.actors, self.work.shape.blocks
        each = -(-blocks // actors)  # of the actor that has the most
        groups = len(self.shares.group_tokens)
        passing = self._pass(work.tokens, routed=False, whole=True)
        hop = self._send(self._hidden(work.tokens), lent=False) + self._receive(self._hidden(work.tokens))
        piped = (each * passing + hop) * (groups + actors - 2) / groups if actors > 1 else 0.0
        # But for an actor's last block the pass goes on to the end, and its outputs are the next block's inputs.
        alone = ((each - 1) * passing + self._pass(work.tokens, routed=False)) / each + self._load() + CALL + READS * self._spilled()
        alone += sum(self._fit_alone(columns) for _, columns in work.groups) if work.job.num_clusters > 1 else 0.0
        alone += sum(self._sums(work.tokens, columns) + self._solve_batches(rows, columns, work.job.num_clusters) for rows, columns in work.groups)
        alone += PACK * work.expert_bytes / self.rates.copy
        write = self.write_seconds()
        return self._around({"dense pass": piped, "expand": each * max(alone, write) + write})

    def _around(self, stages: dict[str, float]) -> dict[str, float]:
        work = self.work
        shell = work.shape.shell * work.dtype.itemsize
        around = {"start": START[self.cluster.device_type]} | ({"sample": self.sample_seconds()} if work.sampled else {})
        around |= {"embed": 0.3 + shell / self.rates.to_device + shell / self.rates.store} | stages
        around["assemble"] = work.model_bytes * (1 / self.rates.file + 1 / self.rates.hash + 1 / self.rates.store)
        if work.evaluation:
            block = work.shape.block
            around["evaluate expanded"] = self.evaluate_seconds((block.parameters - block.expanded_parameters) * work.dtype.itemsize + work.packed_bytes, True)
            if not work.job.no_dense:
                around["evaluate dense"] = self.evaluate_seconds(block.parameters * work.dtype.itemsize, False)
        return around

    def moved(self) -> dict[str, int]:
        """Bytes handed to the object store by stage, of the whole job."""
        work, actors, blocks = self.work, self.cluster.actors, self.work.shape.blocks
        dense = work.shape.block.parameters * work.dtype.itemsize
        if work.job.propagation == "dense":
            return {"dense pass": (actors - 1) * self._hidden(work.tokens)}
        points = sum(4 * work.tokens * work.components(columns) for _, columns in work.groups)
        parts = 0 if work.job.no_pca or work.job.num_clusters == 1 else sum(4 * columns**2 * sum(self.shares.nodes_of_sums) for _, columns in work.groups)
        tokens = sum(columns for _, columns in work.groups) * work.tokens * work.dtype.itemsize * (1 - 1 / actors)
        return {"capture": blocks * dense, "cluster": blocks * (points + parts), "solve": int(blocks * tokens),
                "propagate": blocks * work.packed_bytes if actors > 1 else 0}

    # Stages of a block, in seconds

    def cluster_seconds(self) -> float:
        """Sums, decomposition, projection, rounds of KMeans over everybody's projected tokens, the router."""
        work, own, actors = self.work, self.shares.own_tokens, self.cluster.actors
        together, decisions = 0.0, []
        for _, columns in work.groups:
            dimensions = work.components(columns)
            points = 4 * work.tokens * dimensions
            if not work.job.no_pca:
                square = 4 * columns**2
                together += self._token_sums(own, columns) + self._sums(own, columns) + self._send(square * max(self.shares.nodes_of_sums))
                decisions.append(self._receive(square * sum(self.shares.nodes_of_sums)) + self._axes(columns, dimensions))
                together += self._project(own, columns, dimensions)
            together += self._send(points / actors) + self._receive(points)
        deciding = max(decisions, default=0.0) if actors > 1 else sum(decisions)  # each router by another actor
        return together + deciding + self._rounds() + 8 * CALL

    def _rounds(self) -> float:
        """The tournaments of all routers, whose runs go to whoever is free; no faster than the rounds of one follow each other."""
        work, total, longest = self.work, 0.0, 0.0
        for _, columns in work.groups:
            tournament, chain = self._tournament(), 0.0
            while tournament.entries:
                runs = [self._runs(tournament, [entry], work.components(columns)) for entry in tournament.entries]
                total, chain = total + sum(runs), chain + max(runs)
                tournament.advance([Run(None, None, 0.0) for _ in tournament.entries])
            longest = max(longest, chain)
        at_once = self.cluster.threads if self.cluster.device_type == "cpu" else 1
        return max(total / (self.cluster.actors * at_once), longest)

    def _tournament(self) -> Tournament:
        return Tournament(self.work.tokens, self.work.job.num_clusters, self.work.job.kmeans_restarts, 0, self.cluster.device_type)

    def _runs(self, tournament: Tournament, entries: Iterable[Entry], dimensions: int) -> float:
        """KMeans runs of one actor: one after the other on a GPU, one a thread on a CPU."""
        entries = list(entries)
        if not entries:
            return 0.0
        experts = self.work.job.num_clusters
        # Of a step a part goes with the clusters, the rest with reading the tokens.
        step = self.rates.kmeans * dimensions * (0.6 + 0.4 * experts / CLUSTERS)
        seconds = 0.0
        for entry in entries:
            tokens = tournament.sampled if entry.sampled else self.work.tokens
            steps = min(SAMPLED_STEPS if entry.sampled else STEPS, entry.steps if entry.steps < LAST_STEPS else STEPS)
            choosing = 0.0 if entry.steps < LAST_STEPS or not entry.sampled else experts / 2
            seconds += entry.restarts * (steps * (self.rates.step + tokens * step) + choosing * self.rates.step)
        busy = min(self.cluster.threads, len(entries)) if self.cluster.device_type == "cpu" else 1
        return seconds * (self.cluster.threads / busy if self.cluster.device_type == "cpu" else 1)

    def _fit_alone(self, columns: int) -> float:
        """A router by one actor, of all tokens."""
        work, dimensions, tournament = self.work, self.work.components(columns), self._tournament()
        seconds = self._project(work.tokens, columns, dimensions)
        if not work.job.no_pca:
            seconds += self._token_sums(work.tokens, columns) + self._sums(work.tokens, columns) + self._axes(columns, dimensions)
        while tournament.entries:
            seconds += self._runs(tournament, tournament.entries, dimensions)
            tournament.advance([Run(None, None, 0.0) for _ in tournament.entries])
        return seconds

    def solve_seconds(self) -> float:
        """Of the actor that takes the longest: tokens to it and from it, sums, factors, solves."""
        return max(self._solve_of(tasks) for tasks in self.shares.tasks)

    def _solve_of(self, tasks) -> float:
        work, actors, seconds = self.work, self.cluster.actors, 0.0
        for task in tasks:
            rows, columns = work.groups[task.router]
            tokens = sum(self.shares.counts[task.router][expert] for expert in task.experts)
            seconds += self._sums(tokens, columns, len(task.experts)) + self._solve_batches(rows, columns, len(task.experts))
            seconds += PACK * len(task.experts) * rows * columns * work.dtype.itemsize / self.rates.copy
            # Everybody on a node is sent tokens of its own.
            seconds += self._receive(tokens * columns * work.dtype.itemsize * (1 - 1 / actors), self.cluster.actors_on_node)
        if actors > 1:
            seconds += self._send(self.shares.own_tokens * sum(columns for _, columns in work.groups) * work.dtype.itemsize * (1 - 1 / actors))
        return seconds

    def propagate_seconds(self) -> float:
        work, actors = self.work, self.cluster.actors
        size = 1.0 if self._near else work.packing
        exchange = self._send(size * self.shares.most_weights) + self._receive(size * (work.expert_bytes - self.shares.most_weights)) if actors > 1 else 0.0
        return exchange + self._pass(self.shares.own_tokens, routed=True)

    def write_seconds(self) -> float:
        """Of one block's shard, beside what is computed: everybody's own experts, to one disk of a node. With dense propagation
        everybody has a shard."""
        size, rates = self.work.shard_bytes, self.rates
        on_disk = self.cluster.actors_on_node * (size if self.work.job.propagation == "dense" else size / self.cluster.actors)
        return self.work.packing * self.shares.most_weights * (1 / rates.from_device + 1 / rates.hash) + on_disk / rates.file

    def evaluate_seconds(self, block_bytes: int, routed: bool) -> float:
        """A block is read while the one before runs."""
        work, tokens = self.work, self.shares.own_evaluation
        running = self._pass(tokens, routed=False, whole=True) + (self._sorting(tokens) if routed else 0) + block_bytes / self.rates.to_device + 2 * CALL
        reading = 2 * block_bytes / self.rates.store + self._across(block_bytes)
        head = tokens * work.shape.vocabulary * (2 * work.shape.block.hidden / (PASS * self._product()) + 24 / self.rates.copy)
        return 0.3 + work.shape.blocks * max(running, reading) + head

    def sample_seconds(self) -> float:
        """Token by token: the weights and the whole cache are read for each."""
        work, rates, seconds = self.work, self.rates, 0.0
        for windows, length in work.sampled:
            batches = -(-windows // max(1, TOKENS_PER_BATCH // length))
            small = work.shape.blocks * BLOCK_CALLS * max(rates.step, CPU_STEP)
            reads = (work.shape.parameters * work.dtype.itemsize + work.cache_bytes) / rates.copy
            seconds += length * (batches * (small + reads) + 2 * windows * work.shape.parameters / (PASS * self._product()))
        return seconds

    # What stages are made of, in seconds

    @property
    def _near(self) -> bool:
        return near(self.cluster)

    @property
    def _on_gpu(self) -> bool:
        return self.cluster.device_type == "cuda"

    def _product(self) -> float:
        return self.rates.product16 if self._on_gpu and self.work.dtype.itemsize == 2 else self.rates.product32

    def _pass(self, tokens: int, routed: bool, whole: bool = False) -> float:
        """One pass of tokens through the block: dense up to the down projection, which is what capture needs; or through the experts,
        with what attention gave before; or whole."""
        work = self.work
        (rows, hidden), (out, wide) = work.groups
        attention = work.shape.block.parameters - work.shape.block.expanded_parameters + work.length * work.shape.attention  # half a window is seen
        features = (out * wide + rows * hidden) if routed else attention + rows * hidden + (out * wide if whole else 0)
        return 2 * tokens * features / (PASS * self._product()) + (self._sorting(tokens) if routed else 0.0)

    def _sorting(self, tokens: int) -> float:
        """Tokens to their experts and back, for every linear, and a call of each."""
        work = self.work
        if work.job.num_clusters == 1:
            return 0.0
        features = sum(rows + linears * columns for (rows, columns), linears in zip(work.groups, work.shape.linears))
        calls = sum(work.shape.linears) * work.job.num_clusters * len(self.shares.own_groups)
        return 8 * tokens * features * work.dtype.itemsize / self.rates.copy + calls * 0.13 * self.rates.step

    def _token_sums(self, tokens: int, columns: int) -> float:
        return 3 * tokens * columns * 4 / self.rates.copy + tokens / TOKENS_PER_CHUNK * self.rates.step / 2

    def _sums(self, tokens: int, columns: int, experts: int = 1) -> float:
        direct = self._on_gpu and self.work.dtype.itemsize == 2
        rate = SUMS16 * self.rates.product16 if direct else SUMS32 * self.rates.product32
        chunks = tokens / TOKENS_PER_CHUNK + experts
        return max(tokens * columns**2 / rate, chunks * CHUNK_STEPS * self.rates.step)

    def _axes(self, columns: int, dimensions: int) -> float:
        vectors = dimensions * MORE + 16
        if columns > WHOLE and dimensions * MORE < columns / 2:
            round_ = 1.5 * (2 * columns**2 * vectors + 4 * columns * vectors**2) / self.rates.product32
            return ITERATIONS * (round_ + vectors * COLUMN_STEPS * self.rates.step)
        return 9 * columns**3 / (0.3 * self.rates.product32) + columns * COLUMN_STEPS * self.rates.step

    def _project(self, tokens: int, columns: int, dimensions: int) -> float:
        if self.work.job.no_pca:
            return 8 * tokens * dimensions / self.rates.copy
        return 2 * tokens * columns * dimensions / (0.85 * self.rates.product32) + tokens / TOKENS_PER_CHUNK * self.rates.step

    def _solve_batches(self, rows: int, columns: int, experts: int) -> float:
        """Factors and solves; their batches are taken to be as large as can be."""
        operations = 2 / 3 * columns**3 / FACTOR[self.cluster.device_type] + rows * columns**2
        columns_alone = columns / BLOCK * (BLOCK_STEPS * self.rates.step + experts * rows * COLUMN_PASSES * 4 * BLOCK / self.rates.copy)
        return experts * operations / self.rates.product32 + columns_alone + -(-columns // LEAF) * LEAF_STEPS * self.rates.step

    def _load(self) -> float:
        return self.work.shape.block.parameters * self.work.dtype.itemsize / self.rates.to_device

    def _spilled(self) -> float:
        """Reading what is not kept on the device once."""
        placed = self.device.placed
        return (placed["host"] / self.rates.to_device if self._on_gpu else 0.0) + placed["disk"] / self.rates.file

    def _hidden(self, tokens: int) -> int:
        return tokens * self.work.shape.block.hidden * self.work.dtype.itemsize

    def _send(self, size: float, lent: bool = True) -> float:
        """From the device into the object store; or, among GPUs of one machine, to where the others can read it."""
        if lent and self._near:
            return 2 * size / self.rates.copy
        return size * (1 / self.rates.from_device + 1 / self.rates.store) if self._on_gpu else size / self.rates.store

    def _receive(self, size: float, receivers: int = 1) -> float:
        """From the object store, a part of it from other nodes', to the device. receivers: on a node, of other objects; the same
        ones come to a node once."""
        return self._across(receivers * size) + (size / self.rates.to_device if self._on_gpu else 0.0)

    def _across(self, size: float) -> float:
        nodes = self.cluster.nodes
        return size * (nodes - 1) / nodes / self.rates.network
