"""What two actors gain over one, and what Ray costs beside the same stages called one after the other in one process.

On a CPU every actor has one thread; the ceiling is what two plain processes gain that have nothing to do with each other. On a GPU
there is an actor for each. Random tokens, a model shaped as pythia-mini, 16 experts at 0.5, nothing evaluated.
"""

import multiprocessing
import time

import numpy as np
import pytest
import ray
import torch

from pipeline.activations import Kept, Shelf
from pipeline.architectures import architecture_of
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.demo import DEMO_MODEL
from pipeline.expansion import TokensByExpert, capture, fit_router, propagate, solve_experts
from pipeline.packing import forms_of
from pipeline.routing import Routing
from pipeline.shard import expert_tensors, router_tensors
from pipeline.storage import Storage
from pipeline.windows import Windows
from tests.benchmarks.measure import DEVICE, ON_GPU
from tests.conftest import run_job

WINDOWS, LENGTH, BLOCKS, VOCABULARY = 128, 512, 4, 2048
NOT_COUNTED = {"start", "windows", "assemble"}  # once a job, whatever the actors


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    np.save(directory / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, LENGTH)))
    return ["--model", DEMO_MODEL, "--dataset", directory / "ids.npy", "--eval-dataset", "none", "--num-clusters", 16, "--dtype", "float32", "--threads", 1]


def job_seconds(options, directory, actors: int, propagation: str) -> tuple[float, dict]:
    result = run_job(*options, "--actors", actors, "--propagation", propagation, "--output-dir", directory)
    stages = {stage: seconds for stage, seconds in result["seconds_by_stage"].items() if stage not in NOT_COUNTED}
    return sum(stages.values()), {**stages, "busy": result["busy_share"]}


def spin(started, seconds: float, results) -> None:
    torch.set_num_threads(1)
    left, right = torch.randn(2, 512, 512).unbind()
    started.wait()
    until, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        left @ right
        count += 1
    results.put(count)


def ceiling() -> float:
    """What two processes of one thread each do in the time in which one does 1."""
    context, counts = multiprocessing.get_context("spawn"), {}
    for processes in (1, 2):
        started, results = context.Barrier(processes), context.Queue()
        workers = [context.Process(target=spin, args=(started, 3.0, results)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        counts[processes] = sum(results.get() for _ in workers)
        for worker in workers:
            worker.join()
    return counts[2] / counts[1]


@pytest.mark.parametrize("propagation", ["sparse", "dense"])
def test_two_actors(options, propagation, tmp_path, benchmark, record):
    most = torch.cuda.device_count() if ON_GPU else 2
    if most < 2:
        pytest.skip("one GPU")
    one, _ = job_seconds(options, tmp_path / "one", 1, propagation)
    two, stages = benchmark.pedantic(lambda: job_seconds(options, tmp_path / "two", most, propagation), rounds=1)
    gained = {"gain": one / two} | ({} if ON_GPU else {"of at most": ceiling()})
    record(f"{most} actors, {propagation} propagation, pythia-mini-shaped", two, one / most, one, **gained, **stages)
    ray.shutdown()


@torch.no_grad()
def in_one_process(job: Job, windows: Windows, directory) -> None:
    """The same stages, without Ray, processes or overlap."""
    model, architecture, shelf = BlockwiseModel(DEMO_MODEL, torch.float32, DEVICE), architecture_of("gpt_neox", ""), Shelf(DEVICE)
    hidden = {number: Kept(model.embed(ids_WL)) for number, ids_WL in enumerate(windows.groups(DEVICE.type))}
    sizes = [kept.tensor.shape[:2].numel() for kept in hidden.values()]
    storage = Storage(str(directory))
    for index in range(BLOCKS):
        block = model.load_block(index)
        captured = capture(model, block, index, hidden, architecture, shelf)
        weights, routers = {}, []
        for router, group in enumerate(architecture.router_groups):
            inputs_NC = captured.inputs[router].tensor
            fitted: Routing = fit_router(job, inputs_NC, sizes, DEVICE)
            counts = torch.bincount(fitted.labels_N.long(), minlength=job.num_clusters).tolist()
            by_expert = TokensByExpert(inputs_NC, fitted.labels_N, job.num_clusters)
            linears = {path: block.get_submodule(path).weight for path in group}
            weights |= solve_experts([job], linears, list(range(job.num_clusters)), by_expert.of, counts)[0].weights
            routers.append(({"weight": fitted.weight_EC, "bias": fitted.bias_E}, fitted.labels_N))
        dense = {path: block.get_submodule(path).weight for path in weights}
        storage.write(index, expert_tensors(forms_of(job, dense, torch.float32), range(job.num_clusters), weights, {}) | router_tensors(architecture.router_groups, routers, job.num_clusters))
        propagate(model, block, index, hidden, architecture, weights, [labels_N for _, labels_N in routers], captured.attention)


def test_the_cost_of_ray(options, tmp_path, benchmark, record):
    job = Job(model="demo", num_clusters=16, dtype="float32")
    windows = Windows(torch.from_numpy(np.load(options[3])), "")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = []
    for number in range(2):  # the first loads and compiles
        start = time.perf_counter()
        in_one_process(job, windows, tmp_path / str(number))
        plain.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    here, stages = benchmark.pedantic(lambda: job_seconds(options, tmp_path / "ray", 1, "sparse"), rounds=1)
    record("one actor by Ray, beside the same stages in one process", here, None, plain[1], cost=here / plain[1] - 1, **stages)
    ray.shutdown()
