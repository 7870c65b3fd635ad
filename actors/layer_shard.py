"""The actor: owns consecutive blocks of the model and a share of the calibration and evaluation windows.

Activations live in the actor that owns their windows and nowhere else. What moves between actors is a block's dense
weights, tokens by expert, routers and finished experts. All state can be derived again from the run directory.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import torch
from torch import Tensor

from actors.wire import Wire, pack, pack_all, unpack, unpack_all
from pipeline.architectures import Architecture
from pipeline.assembly import Assembly, assemble
from pipeline.blocks import BlockwiseModel
from pipeline.checkpoint import labels_dtype, layer_path, read_shard, write_shard
from pipeline.config import Job
from pipeline.devices import device_name, prepare_device
from pipeline.expansion import TokensByExpert, capture, fit_router, propagate, solve_experts
from pipeline.modeling_sparse_expansion import router_name
from pipeline.perplexity import window_losses
from pipeline.sampling import sample_windows
from pipeline.warmth import warm_up

log = logging.getLogger("sparse_expansion")


@dataclass
class Task:
    """Experts of one router's linears that one actor solves."""

    router: int
    experts: list[int]


@dataclass
class Place:
    """An actor's device, for people, and Ray's name of its process."""

    device: str
    worker: str


# Files are read and written beside the calls that compute: the next block's weights while this block is solved, a block's
# shard while the next one goes on.
beside = ray.method(concurrency_group="files")


@ray.remote(concurrency_groups={"files": 1})
class LayerShard:
    def __init__(self, rank: int, threads: int, dtype: str, verbose: bool):
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"actor {rank}: %(message)s", force=True)
        self.rank = rank
        self.device = prepare_device(bool(ray.get_gpu_ids()), threads)
        self.dtype = getattr(torch, dtype)

    def warm_up(self, job: Job) -> None:
        """Load and compile what the first block would else wait for."""
        warm_up(job, self.device)

    def where(self) -> Place:
        return Place(device_name(self.device), ray.get_runtime_context().get_worker_id())

    def sample(self, directory: Path, count: int, length: int, seed: int) -> Tensor:
        return sample_windows(directory, count, length, seed, self.device, self.dtype)

    # Calibration: one block after the other

    def begin(self, job: Job, directory: Path, run: Path, architecture: Architecture, windows: dict[int, Tensor], start: int) -> None:
        """Take over a share of the calibration windows, by group number, and embed them. `directory`: the dense model's. `start`: the
        tokens before these."""
        self.job, self.run, self.architecture, self.groups = job, run, architecture, architecture.router_groups
        self.model = BlockwiseModel(directory, self.dtype, self.device)
        self.hidden = {number: self.model.embed(ids) for number, ids in windows.items()}
        self.solved: dict[int, dict[tuple[int, tuple[int, ...]], dict[str, Tensor]]] = {}  # experts by block and task
        self.share = slice(start, start + sum(ids.numel() for ids in windows.values()))

    @beside
    def publish(self, index: int) -> dict:
        """The dense weights of a block of this actor's own, for every actor."""
        return pack_all(self.model.block_weights(index))

    def capture(self, index: int, weights: dict) -> None:
        log.info("layer %d: capturing %d window groups", index, len(self.hidden))
        self.solved[index] = {}
        self.sorted: dict[int, TokensByExpert] = {}
        self.block = self.model.load_block(index, unpack_all(weights))
        self.captured = capture(self.model, self.block, index, self.hidden, self.architecture)

    def tokens(self, router: int) -> Wire:
        """This actor's inputs of a router's linears."""
        return pack(self.captured.inputs[router])

    def fit(self, router: int, *elsewhere: Wire) -> dict:
        """Fit a router on all actors' tokens (`elsewhere`: the others', by rank). Returns its tensors, the labels of all
        tokens, and their counts."""
        log.info("fitting router %d", router)
        routing = fit_router(self.job, self._with_own(self.captured.inputs[router], elsewhere))
        return {
            "tensors": pack_all({"weight": routing.weight_EC, "bias": routing.bias_E}), "inertia": routing.inertia, "labels": pack(routing.labels_N),
            "counts": torch.bincount(routing.labels_N.long(), minlength=self.job.num_clusters).tolist(),
        }

    def _with_own(self, own: Tensor, elsewhere: Sequence[Wire]) -> Tensor:
        """All actors' tokens in window order."""
        if not elsewhere:
            return own
        parts = [unpack(wire, self.device) for wire in elsewhere]
        parts.insert(self.rank, own)
        return torch.cat(parts)

    def tokens_of(self, fitted: dict, task: Task) -> dict[int, Wire]:
        """This actor's tokens of every expert of a task, for the actor that solves it."""
        return {expert: pack(self._tokens_of(fitted, task.router, expert)) for expert in task.experts}

    def _tokens_of(self, fitted: dict, router: int, expert: int) -> Tensor:
        """All tokens for an expert that has none anywhere: it falls back to its layer's Hessian."""
        if router not in self.sorted:
            labels_N = unpack(fitted["labels"])[self.share].to(self.device)
            self.sorted[router] = TokensByExpert(self.captured.inputs[router], labels_N, self.job.num_clusters)
        return self.sorted[router].of(expert) if fitted["counts"][expert] else self.captured.inputs[router]

    def solve(self, index: int, fitted: dict, task: Task, *elsewhere: dict[int, Wire]) -> list[dict]:
        """Solve a task's experts; the weights stay here until `forget`. Returns their reports."""
        log.info("solving experts %s of router %d", task.experts, task.router)
        group = self.groups[task.router]
        linears = {path: self.block.get_submodule(path).weight for path in group}

        def tokens_of(expert: int) -> Tensor:
            return self._with_own(self._tokens_of(fitted, task.router, expert), [others[expert] for others in elsewhere])

        weights, reports = solve_experts(self.job, linears, task.experts, tokens_of, fitted["counts"])
        self.solved[index][task.router, tuple(task.experts)] = weights
        return [{"router": router_name(list(group)), **asdict(report)} for report in reports]

    def experts(self, index: int, task: Task) -> dict:
        """The finished experts of a task, for the other actors."""
        return pack_all(self.solved[index][task.router, tuple(task.experts)])

    def forget(self, index: int) -> None:
        """A block is written: its experts are not needed any more."""
        self.solved.pop(index, None)

    @beside
    def write(self, index: int, fitted: list[dict], tasks: list[Task], *elsewhere: dict) -> str:
        """Write a block's shard; returns its hash."""
        tensors = self._weights(index, tasks, elsewhere, torch.device("cpu"))
        tensors = {f"{path}.weight": weight for path, weight in tensors.items()}
        for router, (group, fit) in enumerate(zip(self.groups, fitted)):
            for name, tensor in unpack_all(fit["tensors"]).items():
                tensors[f"{router_name(list(group))}.{name}"] = tensor
            tensors[f"labels.{router}"] = unpack(fit["labels"]).to(labels_dtype(self.job.num_clusters))
        return write_shard(layer_path(self.run, index), tensors)

    def propagate(self, index: int, fitted: list[dict], tasks: list[Task], *elsewhere: dict) -> None:
        """Send this actor's windows through the experts: the next block's inputs."""
        self.sorted = self.captured.inputs = None
        self._propagate(index, self._weights(index, tasks, elsewhere, self.device), [unpack(fit["labels"]) for fit in fitted], self.captured.attention)

    def replay(self, index: int, weights: dict) -> None:
        """Send this actor's windows through a block that is already on disk."""
        tensors, labels = read_shard(layer_path(self.run, index))
        self.block = self.model.load_block(index, unpack_all(weights))
        paths = [path for group in self.groups for path in group]
        self._propagate(index, {path: tensors[f"{path}.weight"].to(self.device) for path in paths}, labels)

    def _propagate(self, index: int, weights: dict[str, Tensor], labels: list[Tensor], attention: dict | None = None) -> None:
        own = [labels_N[self.share].to(self.device) for labels_N in labels]
        propagate(self.model, self.block, index, self.hidden, self.architecture, weights, own, attention)

    def _weights(self, index: int, tasks: list[Task], elsewhere: tuple[dict, ...], device: torch.device) -> dict[str, Tensor]:
        """Experts of all tasks in order (E, R, C) by path: this actor's own, and the others' in the order of the tasks."""
        others = iter(elsewhere)
        pieces: dict[str, dict[int, Tensor]] = {}
        for task in tasks:
            own = self.solved[index].get((task.router, tuple(task.experts)))
            found = {path: weight_ERC.to(device) for path, weight_ERC in own.items()} if own else unpack_all(next(others), device)
            if len(task.experts) == self.job.num_clusters:  # all of them, in order
                pieces |= found
                continue
            for path, weight_ERC in found.items():
                pieces.setdefault(path, {}).update(zip(task.experts, weight_ERC))
        return {path: found if isinstance(found, Tensor) else torch.stack([found[expert] for expert in sorted(found)])
                for path, found in pieces.items()}

    # Evaluation: block by block, every actor its own windows

    def begin_evaluation(self, directory: Path, windows: dict[int, Tensor]) -> None:
        self.model = BlockwiseModel(directory, self.dtype, self.device)
        self.ids = windows
        self.hidden = {number: self.model.embed(ids) for number, ids in windows.items()}

    def evaluate_block(self, index: int) -> None:
        if self.hidden:
            block = self.model.load_block(index)
            for number, hidden in self.hidden.items():
                self.hidden[number] = self.model.run(block, index, hidden)

    def finish_evaluation(self) -> dict[int, list[float]]:
        """The loss of every window, by window group."""
        losses = {number: window_losses(self.model, hidden, self.ids[number]) for number, hidden in self.hidden.items()}
        self.hidden, self.ids = {}, {}
        return losses

    def assemble(self, assembly: Assembly, target: Path) -> dict[str, str]:
        return assemble(assembly, target)
