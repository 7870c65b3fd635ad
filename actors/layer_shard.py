"""The actor: owns consecutive blocks of the model and a share of the calibration and evaluation windows.

Activations live in the actor that owns their windows and nowhere else. What moves between actors is a block's dense
weights, sums and projected tokens for the routers, tokens by expert, routers and finished experts. All state can be derived
again from the run directory.
"""

import functools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray
import torch
from torch import Tensor

from actors.metrics import Counts, Meter
from actors.wire import Outbox, Wire, unpack, unpack_all
from pipeline import principal, routing
from pipeline.activations import Shelf, room
from pipeline.architectures import Architecture
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.devices import device_name, prepare_device
from pipeline.errors import UserError
from pipeline.expansion import Solved, TokensByExpert, advance, capture, fit_router, propagate, solve_experts
from pipeline.footprint import shape_of, working_bytes
from pipeline.layout import Entry, Layout, described
from pipeline.loans import Handle, LoanError, borrow
from pipeline.modeling_sparse_expansion import router_name
from pipeline.packed_experts import Form
from pipeline.packing import forms_of
from pipeline.perplexity import window_losses
from pipeline.routing import Run, Tournament
from pipeline.sampling import sample_windows
from pipeline.schedule import Task, in_groups, in_order
from pipeline.shard import dense_experts, expert_tensors, router_tensors, take_labels
from pipeline.storage import Storage
from pipeline.timeline import Clock
from pipeline.warmth import warm_up
from pipeline.weights import Checkpoint

log = logging.getLogger("sparse_expansion")


@dataclass
class Place:
    """An actor's device, machine and process, for people and for Ray."""

    device: str
    host: str
    node: str
    worker: str
    process: int


@dataclass
class ModelFiles:
    """The dense or expanded model: its directory, where the actor sees it; otherwise its configuration and the weights outside
    its blocks, as the driver read them."""

    directory: Path | None
    config: object = None
    shell: dict | None = None

    def open(self, dtype: torch.dtype, device: torch.device) -> BlockwiseModel:
        return BlockwiseModel(self.directory, dtype, device, self.config, self.shell and unpack_all(self.shell))


@dataclass
class Share:
    """Calibration windows of one actor. windows: token ids by group number. tokens: of every group of the job. alone: nobody else
    has any, or needs them."""

    windows: dict[int, Tensor]
    tokens: list[int]
    alone: bool

    @property
    def first(self) -> int:
        return min(self.windows, default=0)

    @property
    def sizes(self) -> list[int]:
        return [self.tokens[group] for group in self.windows]

    @property
    def slice(self) -> slice:
        """Its tokens among all."""
        start = sum(self.tokens[:self.first])
        return slice(start, start + sum(self.sizes))


Made = tuple[int, int]  # a block in the making: number of the job (0 where there is one), index of the block
READS, WRITES = "reads", "writes"  # what is done beside computing
OFFERED = 64  # numbers in the offer by which actors find out whether they can borrow
ROUTERS, TOKENS, EXPERTS = "routers", "tokens", "experts"  # what is lent until a block's routers are fitted, its experts solved, and everybody has propagated


def beside(group: str) -> Callable:
    """Of a call that reads or writes files beside those that compute: the next block's weights while this block is solved, a
    block's shard while the next one goes on."""

    def marked(method: Callable) -> Callable:
        method = ray.method(concurrency_group=group)(method)  # before it is wrapped: Ray looks inside

        @functools.wraps(method)
        def call(self, *args, **kwargs):
            with self.meter.during(method.__name__, computes=False):
                return method(self, *args, **kwargs)
        return call
    return marked


def computes(method: Callable) -> Callable:
    """Of a call that computes. Where the device is too small for it beside the activations that are kept there, they make
    room and it is done again."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with self.meter.during(method.__name__, computes=True):
            try:
                return method(self, *args, **kwargs)
            except torch.OutOfMemoryError:
                if not self.shelf.spill():
                    raise
                log.warning("%s: too little GPU memory; activations move to host memory", method.__name__)
                return method(self, *args, **kwargs)
    return call


@ray.remote(concurrency_groups={READS: 1, WRITES: 1, "pulse": 1})
class LayerShard:
    def __init__(self, rank: int, threads: int, dtype: str, verbose: bool, gpu_share: float):
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"actor {rank} on {socket.gethostname()}: %(message)s", force=True)
        self.rank = rank
        self.device = prepare_device(gpu_share if ray.get_gpu_ids() else 0, threads)
        self.dtype = getattr(torch, dtype)
        self.meter, self.shelf = Meter(rank), Shelf(self.device)
        self.outbox = Outbox(self.meter)

    def environ(self, secrets: dict[str, str]) -> None:
        """Keys that this process needs. By a call, since what Ray starts an actor with is stored and shown."""
        os.environ.update(secrets)

    def where(self) -> Place:
        context = ray.get_runtime_context()
        return Place(device_name(self.device), socket.gethostname(), context.get_node_id(), context.get_worker_id(), os.getpid())

    def sees(self, marked: Path | None, token: str, directory: Path, fingerprint: str) -> tuple[bool, bool]:
        """Does this machine see the driver's run directory (`marked` holds `token`), and the model's files? marked: None: shards
        go to a place that everybody reaches."""
        try:
            model = Checkpoint(directory).fingerprint() == fingerprint
        except (UserError, OSError):
            model = False
        return marked is None or marked.is_file() and marked.read_text() == token, model

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Counts:
        peak = torch.cuda.max_memory_allocated() + self.outbox.most if self.device.type == "cuda" else 0
        return replace(self.meter.counts, doing=dict(self.meter.counts.doing), activations=self.shelf.bytes_by_place(), device_peak=peak)

    @ray.method(concurrency_group="pulse")
    def offer(self) -> Handle | None:
        """Something for `borrows`; None where nothing can be lent."""
        try:
            return self.outbox.send(torch.arange(OFFERED, device=self.device), OFFERED)
        except (LoanError, torch.OutOfMemoryError):
            return None

    @ray.method(concurrency_group="pulse")
    def borrows(self, offers: list[Handle | None]) -> bool:
        """Can this actor read the GPU memory of those that made these offers?"""
        try:
            return all(offer is not None and borrow(offer).tolist() == list(range(OFFERED)) for offer in offers)
        except (LoanError, torch.OutOfMemoryError):
            return False

    @computes
    def warm_up(self, job: Job) -> None:
        """Load and compile what the first block would else wait for."""
        warm_up(job, self.device)

    @computes
    def sample(self, directory: Path, count: int, length: int, seed: int) -> Tensor:
        return sample_windows(directory, count, length, seed, self.device, self.dtype)

    # Calibration: one block after the other

    @computes
    def begin(self, job: Job, files: ModelFiles, architecture: Architecture, share: Share, host_bytes: float, folder: Path | None) -> None:
        """Take over a share of the calibration windows and embed them. host_bytes: for activations in host memory. folder: for
        those on disk."""
        self.block = self.captured = self.sorted = self.labels = None  # of an earlier job: its room is wanted
        self.shelf, self.hidden, self.outbox = Shelf(self.device), {}, Outbox(self.meter)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.job, self.architecture, self.groups, self.share = job, architecture, architecture.router_groups, share
        self.model = files.open(self.dtype, self.device)
        self.model.load_shell()
        working = working_bytes(job, shape_of(self.model.empty_block, architecture), sum(share.tokens), self.dtype)
        self.shelf = Shelf(self.device, *room(job.activations, self.device, working, host_bytes), folder)
        self.hidden = {number: self.shelf.put(f"hidden of group {number}", self.model.embed(ids_WL)) for number, ids_WL in share.windows.items()}
        self.loaded: dict[int, torch.nn.Module] = {}  # dense blocks for `pass_on`
        self.solved: dict[Task, dict[str, Tensor]] = {}  # this block's experts (E, R, C) by path
        self.packed: dict[Made, dict[Task, dict[str, Tensor]]] = {}  # what is to be written
        self.own: dict[str, dict] = {"means": {}, "parts": {}, "points": {}}  # by router: what this actor need not send to itself
        self.points: dict[int, Tensor] = {}

    @beside(READS)
    def publish(self, index: int) -> dict:
        """The dense weights of a block of this actor's own, for every actor."""
        return self.outbox.send_all(self.model.block_weights(index))

    @computes
    def capture(self, index: int, weights: dict) -> None:
        log.info("layer %d: capturing %d window groups", index, len(self.hidden))
        self.outbox.take_back(EXPERTS)  # everybody has propagated
        self.solved, self.packed[0, index] = {}, {}
        self._capture(index, unpack_all(weights))

    def _capture(self, index: int, weights: dict[str, Tensor] | None, besides: str = "attention") -> None:
        self.block = self.model.load_block(index, weights)
        self.captured = capture(self.model, self.block, index, self.hidden, self.architecture, self.shelf, besides)
        self.meter.add("tokens", sum(self.share.sizes))

    # A router, of all actors' tokens

    @computes
    def sums(self, router: int) -> Tensor:
        return principal.token_sums(self._inputs(router), self.share.sizes, self.device).cpu()

    @computes
    def scatter(self, router: int, decides: bool, near: bool, *sums: Tensor) -> dict[tuple[int, int], Wire]:
        """This actor's sums for the principal axes, for the one that decomposes them. decides: that is this one. near, here and
        below: everybody that they are for is on this machine and can borrow from its GPU."""
        self.own["means"][router] = self._mean(sums)
        parts = self._scatter_parts(router)
        if decides:
            self.own["parts"][router] = parts
            return {}
        return self.outbox.send_all(parts, ROUTERS if near else None)

    def _scatter_parts(self, router: int) -> dict[tuple[int, int], Tensor]:
        return principal.scatter_parts(self._inputs(router), self.share.sizes, self.share.first, len(self.share.tokens), self.own["means"][router], self.device)

    @computes
    def axes(self, router: int, *elsewhere: dict) -> Wire:
        """The principal axes; `elsewhere`: the others' of `scatter`."""
        components, groups, tokens = self.job.components(self._inputs(router).shape[1]), len(self.share.tokens), sum(self.share.tokens)
        # Own sums are added up in place: an attempt that ran out of memory has used them up.
        parts = self.own["parts"].pop(router, None) or self._scatter_parts(router)
        parts = parts | {node: wire for part in elsewhere for node, wire in part.items()}
        take = lambda part: part if isinstance(part, Tensor) else unpack(part, self.device).clone()  # noqa: E731
        return self.outbox.send(principal.leading_axes(parts, groups, tokens, components, self.job.seed, take))

    @computes
    def project(self, router: int, axes: Wire | None, near: bool, *sums: Tensor) -> Wire | None:
        """This actor's tokens as KMeans sees them, for the others."""
        own_ND = self.own["points"][router] = routing.points(self._inputs(router), self.share.sizes, *self._components(axes, sums), self.device)
        return None if self.share.alone else self.outbox.send(own_ND, ROUTERS if near else None)

    @computes
    def play(self, router: int, tournament: Tournament, entries: Sequence[routing.Entry], *elsewhere: Wire) -> list[Run]:
        """Some runs of a round over everybody's projected tokens (`elsewhere`: the others', by rank), which stay here until `settle`."""
        log.info("router %d: %d runs of KMeans", router, len(entries))
        if router not in self.points:
            parts = [unpack(wire, self.device) for wire in elsewhere]
            parts.insert(self.rank, self.own["points"][router])
            self.points[router] = torch.cat(parts) if len(parts) > 1 else parts[0]
            del self.own["points"][router]
        return routing.play(tournament, entries, self.points[router], self.job.num_clusters)

    @computes
    def route(self, router: int, winner: Run | None, axes: Wire | None, *sums: Tensor) -> dict:
        """The fitted router: its tensors, the labels of all tokens, and their counts. winner: None for one expert."""
        if winner is None:
            fitted = routing.one_cluster(sum(self.share.tokens), self._inputs(router).shape[1], self.device)
        else:
            fitted = routing.as_routing(*self._components(axes, sums), winner, self.device)
        return self._fitted(fitted, self.job)

    def _fitted(self, fitted: routing.Routing, job: Job) -> dict:
        return {
            "tensors": self.outbox.send_all({"weight": fitted.weight_EC, "bias": fitted.bias_E}), "inertia": fitted.inertia, "labels": self.outbox.send(fitted.labels_N),
            "counts": torch.bincount(fitted.labels_N.long(), minlength=job.num_clusters).tolist(),
        }

    def _inputs(self, router: int) -> Tensor:
        return self.captured.inputs[router].tensor

    def _mean(self, sums: Sequence[Tensor]) -> Tensor:
        return principal.mean_of([part_GC.to(self.device) for part_GC in sums], sum(self.share.tokens))

    def _components(self, axes: Wire | None, sums: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Mean and principal axes; neither without PCA."""
        return (None, None) if axes is None else (self._mean(sums), unpack(axes, self.device))

    # Its experts

    @computes
    def settle(self, fitted: list[dict]) -> None:
        """The block's routers are known: this actor's tokens are sorted by expert."""
        self.outbox.take_back(ROUTERS)
        self.points.clear()
        self.own = {"means": {}, "parts": {}, "points": {}}
        self.counts = [fit["counts"] for fit in fitted]
        self.labels = [unpack(fit["labels"])[self.share.slice].to(self.device) for fit in fitted]
        self.sorted = [TokensByExpert(self._inputs(router), labels_N, len(self.counts[router])) for router, labels_N in enumerate(self.labels)]

    @computes
    def tokens_of(self, task: Task, near: bool) -> dict[int, Wire]:
        """This actor's tokens of every expert of a task, for the actor that solves it."""
        return {expert: self.outbox.send(self._tokens_of(task.router, expert), TOKENS if near else None) for expert in task.experts}

    def _tokens_of(self, router: int, expert: int) -> Tensor:
        """All tokens for an expert that has none anywhere: it falls back to its layer's Hessian."""
        return self.sorted[router].of(expert) if self.counts[router][expert] else self._inputs(router)

    @computes
    def solve(self, index: int, task: Task, *elsewhere: dict[int, Wire]) -> tuple[list[dict], dict[str, Entry]]:
        """Solve a task's experts (`elsewhere`: the other actors' tokens, by rank); the weights stay here.
        Returns their reports, and what they are in the block's shard."""
        log.info("layer %d: solving experts %s of router %d", index, list(task.experts), task.router)

        def tokens_of(expert: int) -> list[Tensor]:
            parts = [unpack(others[expert]) for others in elsewhere]
            parts.insert(self.rank, self._tokens_of(task.router, expert))
            return parts

        [solved] = self._solve([self.job], task, tokens_of, self.counts[task.router])
        self.solved[task] = solved.weights
        return self._pack(self.job, (0, index), task, solved)

    def _pack(self, job: Job, made: Made, task: Task, solved: Solved) -> tuple[list[dict], dict[str, Entry]]:
        """Keep experts for the shard. Returns their reports, and what they are in it."""
        group = self.groups[task.router]
        packed = self.packed[made][task] = expert_tensors(self._forms(job, self.block, group), task.experts, solved.weights, solved.grids)
        router = router_name(list(group))
        return [{"router": router, **asdict(report)} for report in solved.reports], described(packed)

    def _solve(self, jobs: list[Job], task: Task, tokens_of: Callable, counts: list[int]) -> list[Solved]:
        group = self.groups[task.router]
        linears = {path: self.block.get_submodule(path).weight for path in group}
        self.meter.add("solves", len(task.experts) * len(linears) * len(jobs))
        return solve_experts(jobs, linears, list(task.experts), tokens_of, counts)

    @computes
    def experts(self, made: Made, task: Task, near: bool) -> dict:
        """The finished experts of a task, for the other actors; packed, where they go through the object store."""
        return self.outbox.send_all(self.solved[task], EXPERTS) if near else self.outbox.send_all(self.packed[made][task])

    @beside(WRITES)
    def hand_over(self, made: Made, task: Task) -> dict:
        """The finished experts of a task, packed, for whoever writes them in this actor's place."""
        return self.outbox.send_all(self.packed[made][task])

    def forget(self, made: Made) -> None:
        """A block is written: its experts are not needed any more."""
        self.packed.pop(made, None)

    @beside(WRITES)
    def write(self, file: Path, layout: Layout, made: Made, tasks: list[Task]) -> dict[str, bytes]:
        """Write this actor's own experts of these tasks into a block's shard, which is being filled by others too; returns their hashes."""
        own = self.packed[made]
        return layout.fill(file, {name: tensor for task in tasks for name, tensor in own[task].items()})

    @beside(WRITES)
    def write_whole(self, storage: Storage, made: Made, fitted: list[dict], tasks: dict[Task, ray.ObjectRef | None]) -> str:
        """Write a block's whole shard; returns its hash. tasks: with the experts of others, which are waited for here: what an actor is
        asked after a call that has to wait for its arguments waits with it."""
        tensors = router_tensors(self.groups, fitted_routers(fitted), len(fitted[0]["counts"]))
        for task, elsewhere in tasks.items():
            tensors |= self.packed[made][task] if elsewhere is None else unpack_all(ray.get(elsewhere))
        return storage.write(made[1], tensors)

    @computes
    def propagate(self, index: int, tasks: list[Task], near: bool, *elsewhere: dict) -> None:
        """Send this actor's windows through the experts: the next block's inputs. elsewhere: what other actors solved, in the order of the tasks."""
        self.outbox.take_back(TOKENS)
        others = iter(elsewhere)
        found = (self.solved.get(task) or self._received(task, next(others), near) for task in tasks)  # one at a time: they come to the device
        weights = in_order(tasks, found, self.device)
        propagate(self.model, self.block, index, self.hidden, self.architecture, weights, self.labels, self.captured.attention)

    @computes
    def replay(self, storage: Storage, index: int, weights: dict, shard: dict | None) -> None:
        """Send this actor's windows through a block that is already made. shard: what the driver read of it, where this
        actor does not see it."""
        tensors = storage.read(index) if shard is None else unpack_all(shard)
        labels = take_labels(tensors)
        block = self.model.load_block(index, unpack_all(weights))
        everybody = range(self.job.num_clusters)
        experts = {path: dense_experts(tensors, path, form, everybody, self.dtype, self.device) for group in self.groups for path, form in self._forms(self.job, block, group).items()}
        propagate(self.model, block, index, self.hidden, self.architecture, experts, [labels_N[self.share.slice].to(self.device) for labels_N in labels])

    def _received(self, task: Task, wires: dict, near: bool) -> dict[str, Tensor]:
        """Experts (E, R, C) of a task that another actor solved, by path."""
        tensors = unpack_all(wires)
        if near:
            return tensors
        forms = self._forms(self.job, self.block, self.groups[task.router])
        return {path: dense_experts(tensors, path, form, task.experts, self.dtype, self.device) for path, form in forms.items()}

    def _forms(self, job: Job, block: torch.nn.Module, group: Sequence[str]) -> dict[str, Form | None]:
        """How experts of these linears are stored."""
        return forms_of(job, {path: block.get_submodule(path).weight for path in group}, self.dtype)

    # Blocks that do not wait for each other (--propagation dense): this actor makes its own alone, from all windows

    @computes
    def load(self, indices: list[int], *weights: dict) -> None:
        """Keep dense blocks for `pass_on`. weights: unless this actor sees the model's files."""
        found = map(unpack_all, weights) if weights else [None] * len(indices)
        self.loaded = {index: self.model.load_block(index, tensors) for index, tensors in zip(indices, found)}

    @computes
    @ray.method(num_returns=2)
    def pass_on(self, number: int, first: int, entering: Wire | None) -> tuple[Wire | None, None]:
        """Keep a window group's hidden states as they enter block `first` (`entering`: as the actor before this one left them;
        None: as embedded) and hand on what they become in the loaded blocks; None without any. The second result only says that it is done."""
        kept = self.hidden[number]
        if entering is not None:
            kept.tensor.copy_(unpack(entering, self.device))
            kept.at = first
        for index, block in self.loaded.items():
            if index < first:  # before its own blocks begin
                advance(self.model, block, index, {number: kept})
        assert kept.at == first, "windows are at another block"
        onwards = [(index, block) for index, block in self.loaded.items() if index >= first]
        if not onwards:
            return None, None
        hidden_WLH = kept.tensor
        for index, block in onwards:
            hidden_WLH = self.model.run(block, index, hidden_WLH)
        return self.outbox.send(hidden_WLH), None

    @computes
    def expand_alone(self, index: int, jobs: list[Job], between: list[int], more: bool, *weights: dict) -> list[dict]:
        """Make a block's experts for several jobs of the same windows. What they have in common (what is captured, routers,
        Hessians, factors) is made once. Returns for each job its routers, tasks (as `solve`) and seconds; the weights stay here until
        `forget`. between: dense blocks that the windows go through first, but for the one that this actor made last. more: it
        will make another one. weights: of those and of this block, unless this actor sees the model's files."""
        found = list(map(unpack_all, weights)) if weights else [None] * (len(between) + 1)
        self.loaded = {}
        clock = Clock()
        with clock.timed("advance"):
            for group, left in (self.captured.outputs if self.captured else {}).items():
                if self.hidden[group].at < left.at <= index:
                    self.hidden[group].tensor.copy_(left.tensor)
                    self.hidden[group].at = left.at
            for number, tensors in zip(between, found):
                if any(kept.at == number for kept in self.hidden.values()):
                    advance(self.model, self.model.load_block(number, tensors), number, self.hidden)
        assert all(kept.at == index for kept in self.hidden.values()), "windows are at another block"
        with clock.timed("capture"):
            self._capture(index, found[-1], "outputs" if more else "")
        results = [{"fitted": [], "tasks": {}, "seconds": {}} for _ in jobs]
        for number in range(len(jobs)):
            self.packed[number, index] = {}
        for router in range(len(self.groups)):
            for alike in in_groups(jobs, lambda job: str(job.routers())):
                with clock.timed("cluster"):
                    fitted = fit_router(jobs[alike[0]], self._inputs(router), self.share.sizes, self.device)
                with clock.timed("solve"):
                    self._solve_alone(index, router, [jobs[number] for number in alike], alike, fitted, results)
        for result in results:
            result["seconds"] = {stage: seconds / len(jobs) for stage, seconds in clock.seconds.items()}
        return results

    def _solve_alone(self, index: int, router: int, jobs: list[Job], numbers: list[int], fitted: routing.Routing, results: list[dict]) -> None:
        """Solve all experts of one router for the jobs that share it."""
        told = self._fitted(fitted, jobs[0])
        by_expert = TokensByExpert(self._inputs(router), fitted.labels_N, jobs[0].num_clusters)
        task = Task(router, tuple(range(jobs[0].num_clusters)))
        log.info("layer %d: solving %d experts of router %d", index, len(task.experts), router)
        solved = self._solve(jobs, task, lambda expert: by_expert.of(expert) if told["counts"][expert] else self._inputs(router), told["counts"])
        for job, number, made in zip(jobs, numbers, solved):
            results[number]["fitted"].append(told)
            results[number]["tasks"][task] = self._pack(job, (number, index), task, made)

    # Evaluation: block by block, every actor its own windows

    @computes
    def begin_evaluation(self, files: ModelFiles, windows: dict[int, Tensor]) -> None:
        self.model = files.open(self.dtype, self.device)
        self.block = self.captured = self.sorted = self.labels = None
        self.shelf = Shelf(self.device)
        self.ids = windows
        self.hidden = {number: self.shelf.put(f"hidden of group {number}", self.model.embed(ids_WL)) for number, ids_WL in windows.items()}

    @computes
    def evaluate_block(self, index: int, weights: dict) -> None:
        if self.hidden:
            advance(self.model, self.model.load_block(index, unpack_all(weights)), index, self.hidden)

    @computes
    def losses(self) -> dict[int, list[float]]:
        """The loss of every window, by window group."""
        return {number: window_losses(self.model, kept.tensor, self.ids[number]) for number, kept in self.hidden.items()}


def fitted_routers(fitted: list[dict]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Tensors and labels of each router, as `router_tensors` takes them."""
    return [(unpack_all(fit["tensors"]), unpack(fit["labels"])) for fit in fitted]
