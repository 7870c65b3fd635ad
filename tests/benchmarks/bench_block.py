"""Capture, and a whole block from its inputs to its outputs, with random weights and clustered activations.

The floor adds up each stage's unavoidable operations at the rate of a large matrix product: dense passes (attention once,
feed-forward twice) in the activations' type, covariance and Hessians (N C^2 each) in that type, factors and solves in float32.
"""

import gc
import time
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.activations import Kept, Shelf
from pipeline.architectures import architecture_of
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.expansion import TokensByExpert, capture, fit_router, propagate, solve_experts
from pipeline.windows import Windows
from tests.benchmarks import plain
from tests.benchmarks.measure import DEVICE, ON_GPU, PeakMemory, product_rate, seconds, synchronize


@dataclass(frozen=True)
class Shape:
    name: str
    model_type: str
    hidden: int
    wide: int
    heads: int
    windows: int
    length: int
    dtype: torch.dtype
    pca: int
    with_plain: bool = False

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    @property
    def gates(self) -> int:
        return 2 if self.model_type == "llama" else 1

    def dense_operations(self) -> float:
        """Of one pass of the block."""
        seen = self.length * self.hidden  # scores and values of a token that sees half of its window
        return 2 * self.tokens * (4 * self.hidden**2 + seen + (self.gates + 1) * self.hidden * self.wide)

    def floor(self, job: Job) -> float:
        again = 2 * self.tokens * self.gates * self.hidden * self.wide  # the gates run dense and sparse
        sums = 2 * self.tokens * (self.hidden**2 + self.wide**2)
        solves = job.num_clusters * sum(2 / 3 * columns**3 + rows * columns**2
                                        for rows, columns in ((self.gates * self.wide, self.hidden), (self.hidden, self.wide)))
        return (self.dense_operations() + again + sums) / product_rate(self.dtype) + solves / product_rate()


MINI = Shape("pythia-mini", "gpt_neox", 256, 1024, 4, 128, 512, torch.float32, 8, with_plain=True)
SHAPES = {False: [MINI], True: [MINI, Shape("Pythia 1.4B", "gpt_neox", 2048, 8192, 16, 128, 2048, torch.bfloat16, 8),
                                Shape("Llama 2 7B", "llama", 4096, 11008, 32, 128, 4096, torch.bfloat16, 32)]}[ON_GPU]
GROWTH = SHAPES[1] if ON_GPU else MINI


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def shape(request) -> Shape:
    return request.param


def make_model(shape: Shape, directory) -> BlockwiseModel:
    config = AutoConfig.for_model(shape.model_type, vocab_size=64, hidden_size=shape.hidden, intermediate_size=shape.wide, num_hidden_layers=1,
                                  num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.length)
    torch.manual_seed(0)
    with DEVICE:
        AutoModelForCausalLM.from_config(config, dtype=shape.dtype).save_pretrained(directory)
    return BlockwiseModel(directory, shape.dtype, DEVICE)


def make_hidden(shape: Shape, model: BlockwiseModel) -> dict[int, Kept]:
    """Clustered activations in place of what the embedding gives; the masks and positions are the model's."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    centres = torch.randn(64, shape.hidden, generator=generator, device=DEVICE)
    hidden = {}
    for number, ids_WL in enumerate(Windows(torch.zeros(shape.windows, shape.length, dtype=torch.long), "").groups(DEVICE.type)):
        model.embed(ids_WL)
        labels = torch.randint(64, ids_WL.shape, generator=generator, device=DEVICE)
        hidden[number] = Kept((centres[labels] + torch.randn(*ids_WL.shape, shape.hidden, generator=generator, device=DEVICE)).to(shape.dtype))
    return hidden


def expand_block(model: BlockwiseModel, hidden: dict[int, Kept], job: Job, shelf: Shelf) -> dict[str, float]:
    """What an actor does for one block, apart from writing it; `hidden` becomes its outputs. Returns seconds by stage."""
    stages: dict[str, float] = {}

    def done(stage: str, start: float) -> float:
        synchronize()
        now = time.perf_counter()
        stages[stage] = stages.get(stage, 0) + now - start
        return now

    architecture = architecture_of(model.config.model_type, "")
    sizes = [kept.tensor.shape[:2].numel() for kept in hidden.values()]
    clock = time.perf_counter()
    block = model.load_block(0)
    clock = done("load", clock)
    captured = capture(model, block, 0, hidden, architecture, shelf)
    clock = done("capture", clock)
    weights, labels = {}, []
    for router, group in enumerate(architecture.router_groups):
        inputs_NC = captured.inputs[router].tensor
        fitted = fit_router(job, inputs_NC, sizes, DEVICE)
        labels.append(fitted.labels_N)
        clock = done("cluster", clock)
        linears = {path: block.get_submodule(path).weight for path in group}
        weights |= solve(job, linears, inputs_NC, fitted.labels_N)
        clock = done("solve", clock)
    propagate(model, block, 0, hidden, architecture, weights, labels, captured.attention)
    done("propagate", clock)
    return stages


def solve(job: Job, linears: dict[str, torch.Tensor], tokens_NC: torch.Tensor, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    by_expert = TokensByExpert(tokens_NC, labels_N, job.num_clusters)
    counts = torch.bincount(labels_N.long(), minlength=job.num_clusters).tolist()
    [solved] = solve_experts([job], linears, list(range(job.num_clusters)), lambda expert: by_expert.of(expert) if counts[expert] else tokens_NC, counts)
    return solved.weights


def measured(shape: Shape, model: BlockwiseModel, job: Job, rounds: int = 2) -> dict[str, float]:
    best: dict[str, float] = {}
    shelf = Shelf(DEVICE)
    for number in range(rounds + 1):  # the first loads and compiles
        hidden = make_hidden(shape, model)
        gc.collect()
        synchronize()
        stages = expand_block(model, hidden, job, shelf)
        if number and (not best or sum(stages.values()) < sum(best.values())):
            best = stages
    return best


@torch.no_grad()
def test_capture(shape, tmp_path, benchmark, record):
    model = make_model(shape, tmp_path)
    hidden, architecture = make_hidden(shape, model), architecture_of(shape.model_type, "")
    block, shelf = model.load_block(0), Shelf(DEVICE)
    here = benchmark.pedantic(lambda: seconds(lambda: capture(model, block, 0, hidden, architecture, shelf)), rounds=1)
    hidden_WLH = torch.cat([kept.tensor for kept in hidden.values()])
    model.embed(torch.zeros(1, shape.length, dtype=torch.long))
    paths = [group[0] for group in architecture.router_groups]
    one_by_one = seconds(lambda: [plain.capture(model, block, 0, hidden_WLH, path) for path in paths], 1)
    operations = shape.dense_operations() - 2 * shape.tokens * shape.hidden * shape.wide  # it stops before the down projection
    record(f"capture, {shape.name}-shaped block, {shape.windows} x {shape.length} tokens", here, operations / product_rate(shape.dtype), one_by_one)


@torch.no_grad()
def test_block(shape, tmp_path, benchmark, record):
    model = make_model(shape, tmp_path)
    job = Job(model="random", num_clusters=16, pca_reduction_factor=shape.pca)
    with PeakMemory() as peak:
        stages = benchmark.pedantic(lambda: measured(shape, model, job), rounds=1)
    memory = {"GB": peak.bytes / 1e9} if ON_GPU else {}
    one_by_one = None
    if shape.with_plain:
        hidden_WLH = torch.cat([kept.tensor for kept in make_hidden(shape, model).values()])
        model.embed(torch.zeros(1, shape.length, dtype=torch.long))
        block, architecture = model.load_block(0), architecture_of(shape.model_type, "")
        one_by_one = seconds(lambda: plain.expand_block(model, block, 0, hidden_WLH, architecture, job), 1, warm=False)
    record(f"block, {shape.name}-shaped, 16 experts, {shape.windows} x {shape.length} tokens", sum(stages.values()), shape.floor(job), one_by_one, **stages, **memory)


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 4, 16, 64])
def test_growth(experts, tmp_path, benchmark, record):
    model = make_model(GROWTH, tmp_path)
    job = Job(model="random", num_clusters=experts, pca_reduction_factor=GROWTH.pca)
    stages = benchmark.pedantic(lambda: measured(GROWTH, model, job), rounds=1)
    record(f"growth, {GROWTH.name}-shaped block, {experts} experts", sum(stages.values()), GROWTH.floor(job), **stages)
