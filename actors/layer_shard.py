"""The actor: owns consecutive blocks of the model and a share of the calibration and evaluation windows.

Activations live in the actor that owns their windows and nowhere else. What moves between actors is a block's dense
weights, tokens by expert, routers and finished experts. All state can be derived again from the run directory.
"""

import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import torch
from torch import Tensor

from actors.wire import pack, pack_all, unpack, unpack_all
from pipeline.assembly import Assembly, assemble
from pipeline.blocks import BlockwiseModel
from pipeline.checkpoint import labels_dtype, layer_path, read_shard, write_shard
from pipeline.config import Job
from pipeline.devices import device_name, prepare_device
from pipeline.expansion import RouterGroups, fit_router, routed_block, solve_experts, tap
from pipeline.modeling_sparse_expansion import router_name
from pipeline.perplexity import window_loss
from pipeline.routing import load_libraries
from pipeline.sampling import sample_windows

log = logging.getLogger("sparse_expansion")


@dataclass
class Task:
    """Experts of one router's linears that one actor solves."""

    router: int
    experts: list[int]


@ray.remote
class LayerShard:
    def __init__(self, rank: int, threads: int, dtype: str, run: Path | None, verbose: bool):
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"actor {rank}: %(message)s", force=True)
        self.rank, self.run = rank, run
        self.device = prepare_device(bool(ray.get_gpu_ids()), threads)
        self.dtype = getattr(torch, dtype)

    def warm_up(self) -> None:
        """Begin to load what clustering needs (cuML takes seconds) beside the first stages."""
        threading.Thread(target=load_libraries, args=(self.device,), daemon=True).start()

    def where(self) -> tuple[str, int, str]:
        """Device type, process id and node, for logs and reports."""
        return device_name(self.device), os.getpid(), ray.get_runtime_context().get_node_id()

    def sample(self, directory: Path, count: int, length: int, seed: int) -> Tensor:
        return sample_windows(directory, count, length, seed, self.device, self.dtype)

    # Calibration: one block after the other

    def begin(self, job: Job, directory: Path, groups: RouterGroups, windows: dict[int, Tensor]) -> None:
        """Take over a share of the calibration windows, by group number, and embed them."""
        self.job, self.groups = job, groups
        self.model = BlockwiseModel(directory, self.dtype, self.device)
        self.hidden = {number: self.model.embed(ids) for number, ids in windows.items()}

    def publish(self, index: int) -> dict:
        """The dense weights of a block of this actor's own, for every actor."""
        return pack_all(self.model.block_weights(index))

    def capture(self, index: int, weights: dict) -> None:
        log.info("layer %d: capturing %d window groups", index, len(self.hidden))
        self.block = self.model.load_block(index, unpack_all(weights))
        self.inputs = tap(self.model, self.block, index, self.hidden, self.groups)
        self.solved: dict[tuple[int, tuple[int, ...]], dict[str, Tensor]] = {}

    def tokens(self, router: int) -> dict:
        """This actor's inputs of a router's linears, by window group."""
        return {number: pack(tokens_NC) for number, tokens_NC in self.inputs[router].items()}

    def fit(self, router: int, *elsewhere: dict) -> dict:
        """Fit a router on all actors' tokens. Returns its tensors, the labels of every window group, and the counts."""
        log.info("fitting router %d", router)
        tokens = dict(self.inputs[router])
        for others in elsewhere:
            tokens |= unpack_all(others, self.device)
        numbers = sorted(tokens)
        routing = fit_router(self.job, torch.cat([tokens[number] for number in numbers]))
        labels = routing.labels_N.split([len(tokens[number]) for number in numbers])
        return {
            "tensors": pack_all({"weight": routing.weight_EC, "bias": routing.bias_E}), "inertia": routing.inertia,
            "labels": {number: pack(part) for number, part in zip(numbers, labels)},
            "counts": torch.bincount(routing.labels_N.long(), minlength=self.job.num_clusters).tolist(),
        }

    def tokens_of(self, fitted: dict, task: Task) -> dict[int, dict]:
        """This actor's tokens of every expert of a task, by window group, for the actor that solves it."""
        return {expert: pack_all(parts) for expert, parts in self._tokens_of(fitted, task).items()}

    def _tokens_of(self, fitted: dict, task: Task) -> dict[int, dict[int, Tensor]]:
        """All of a group's tokens for an expert that has none anywhere: it falls back to its layer's Hessian."""
        found: dict[int, dict[int, Tensor]] = {expert: {} for expert in task.experts}
        for number, tokens_NC in self.inputs[task.router].items():
            labels_N = unpack(fitted["labels"][number], self.device)
            for expert in task.experts:
                empty = fitted["counts"][expert] == 0
                found[expert][number] = tokens_NC if empty else tokens_NC[labels_N == expert]
        return found

    def solve(self, fitted: dict, task: Task, *elsewhere: dict[int, dict]) -> list[dict]:
        """Solve a task's experts; the weights stay here until they are asked for. Returns their reports."""
        log.info("solving experts %s of router %d", task.experts, task.router)
        group = self.groups[task.router]
        linears = {path: self.block.get_submodule(path).weight for path in group}
        found = self._tokens_of(fitted, task)
        for others in elsewhere:
            for expert, parts in others.items():
                found[expert] |= unpack_all(parts, self.device)
        tokens = {expert: [parts[number] for number in sorted(parts)] for expert, parts in found.items()}
        weights, reports = solve_experts(self.job, linears, task.experts, tokens, fitted["counts"])
        self.solved[task.router, tuple(task.experts)] = weights
        return [{"router": router_name(list(group)), **asdict(report)} for report in reports]

    def experts(self, task: Task) -> dict:
        """The finished experts of a task, for the other actors."""
        return pack_all(self.solved[task.router, tuple(task.experts)])

    def write(self, index: int, fitted: list[dict], tasks: list[Task], *elsewhere: dict) -> str:
        """Write a block's shard; returns its hash."""
        tensors = self._weights(tasks, elsewhere)
        tensors = {f"{path}.weight": weight for path, weight in tensors.items()}
        for router, (group, fit) in enumerate(zip(self.groups, fitted)):
            for name, tensor in unpack_all(fit["tensors"]).items():
                tensors[f"{router_name(list(group))}.{name}"] = tensor
            labels = torch.cat([unpack(fit["labels"][number]) for number in sorted(fit["labels"])])
            tensors[f"labels.{router}"] = labels.to(labels_dtype(self.job.num_clusters))
        return write_shard(layer_path(self.run, index), tensors)

    def propagate(self, index: int, fitted: list[dict], tasks: list[Task], *elsewhere: dict) -> None:
        """Send this actor's windows through the experts: the next block's inputs."""
        labels = [{number: unpack(fit["labels"][number], self.device) for number in self.hidden} for fit in fitted]
        self._propagate(index, self._weights(tasks, elsewhere), labels)

    def replay(self, index: int, weights: dict, starts: dict[int, tuple[int, int]]) -> None:
        """Send this actor's windows through a block that is already on disk. `starts`: where each window group's tokens
        stand in the labels, from and to."""
        tensors, all_labels = read_shard(layer_path(self.run, index))
        self.block = self.model.load_block(index, unpack_all(weights))
        paths = [path for group in self.groups for path in group]
        labels = [{number: one[slice(*starts[number])].to(self.device) for number in self.hidden} for one in all_labels]
        self._propagate(index, {path: tensors[f"{path}.weight"].to(self.device) for path in paths}, labels)

    def _propagate(self, index: int, weights: dict[str, Tensor], labels: list[dict[int, Tensor]]) -> None:
        routed, routers = routed_block(self.block, self.groups, weights)
        for number in self.hidden:
            for router, by_number in zip(routers, labels):
                router.labels_N = by_number[number].long()
            self.hidden[number] = self.model.run(routed, index, self.hidden[number])
        self.block = self.inputs = self.solved = None

    def _weights(self, tasks: list[Task], elsewhere: tuple[dict, ...]) -> dict[str, Tensor]:
        """Experts of all tasks in order (E, R, C) by path: this actor's own, and the others' in the order of the tasks."""
        others = iter(elsewhere)
        pieces: dict[str, dict[int, Tensor]] = {}
        for task in tasks:
            own = self.solved.get((task.router, tuple(task.experts)))
            for path, weight_ERC in (own or unpack_all(next(others), self.device)).items():
                pieces.setdefault(path, {}).update(zip(task.experts, weight_ERC))
        return {path: torch.stack([by_expert[expert] for expert in sorted(by_expert)]) for path, by_expert in pieces.items()}

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
        """The loss of every window, by window group. The head runs one window at a time: logits are large."""
        losses = {number: [window_loss(self.model.head(hidden[None])[0], ids) for hidden, ids in zip(self.hidden[number], self.ids[number])]
                  for number in self.hidden}
        self.hidden, self.ids = {}, {}
        return losses

    def assemble(self, assembly: Assembly, target: Path) -> dict[str, str]:
        return assemble(assembly, target)
