"""`plan` and the early refusal of `run`: sizes against tensors and transformers' own models, memory and time against what an H100 took."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.activations import Shelf
from pipeline.architectures import architecture_of
from pipeline.blocks import BlockwiseModel
from pipeline.config import Job
from pipeline.estimate import compared, estimate
from pipeline.expansion import TokensByExpert, capture, fit_router, solve_experts
from pipeline.memory import CONTEXT, Cluster, Shares, Work, device_memory, least_device_memory
from pipeline.model_shape import ModelShape
from pipeline.packing import forms_of
from pipeline.plan_text import describe_comparison
from pipeline.rates import H100, Rates
from pipeline.scaling import MAKING, NODE, STORE, predicted
from pipeline.shard import expert_tensors, router_tensors
from pipeline.storage import Storage
from pipeline.verdict import problems
from pipeline.windows import Windows
from tests.conftest import command, run_job
from tests.models import CONFIGS, save_tiny, tiny_model, token_windows

CPU = torch.device("cpu")
CARD = 85_017_493_504  # bytes of an H100 of 80 GB
SIZES = {
    "Llama-2-7b": ("llama", dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096)),
    "Llama-2-13b": ("llama", dict(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, max_position_embeddings=4096)),
    "Llama-2-70b": ("llama", dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                                  max_position_embeddings=4096)),
    "pythia-1.4b": ("gpt_neox", dict(vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16, max_position_embeddings=2048)),
    "pythia-12b": ("gpt_neox", dict(vocab_size=50688, hidden_size=5120, intermediate_size=20480, num_hidden_layers=36, num_attention_heads=40, max_position_embeddings=2048)),
}


def config_of(name: str, **changes):
    kind, sizes = SIZES[name]
    return AutoConfig.for_model(kind, dtype="bfloat16", **sizes | changes)


@pytest.fixture
def weightless(tmp_path):
    """A directory that holds a model's config.json and nothing else."""
    def make(name: str, **changes):
        config_of(name, **changes).save_pretrained(tmp_path / name)
        return tmp_path / name
    return make


# Sizes, against tensors


@pytest.mark.parametrize("model_type", CONFIGS)
def test_parameters_are_those_of_the_model(model_type):
    model = tiny_model(model_type)
    shape = ModelShape.of(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    architecture = architecture_of(model_type, "")
    block = model.get_submodule(architecture.blocks)[0]
    assert shape.block.parameters == sum(parameter.numel() for parameter in block.parameters())
    assert shape.block.expanded_parameters == sum(block.get_submodule(path).weight.numel() for group in architecture.router_groups for path in group)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_published_models(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert ModelShape.of(config_of(name)).parameters == sum(parameter.numel() for parameter in model.parameters())


SHAPES = {"gpt_neox": dict(hidden_size=64, intermediate_size=256, max_position_embeddings=128), "llama": dict(hidden_size=96, intermediate_size=256, max_position_embeddings=128)}


@pytest.mark.parametrize("model_type", SHAPES)
@torch.no_grad()
def test_bytes_of_a_block_are_those_of_its_tensors(model_type, tmp_path):
    """Captured activations exactly; a shard and the experts as they are written."""
    save_tiny(tmp_path / "model", model_type, **SHAPES[model_type])
    model = BlockwiseModel(tmp_path / "model", torch.float32, CPU)
    architecture = architecture_of(model_type, "")
    job = Job(model="x", num_clusters=3, pca_reduction_factor=4, kmeans_restarts=1)
    windows = Windows(token_windows(48, 128), "")
    work = Work(job, ModelShape.of(model.config), torch.float32, windows.count, windows.length, 0, windows.length)
    cluster = Cluster(1, 1, 0, 1 << 40, 1 << 38, 2)

    shelf, hidden = Shelf(CPU), {}
    for number, ids_WL in enumerate(windows.groups("cpu")):
        hidden[number] = shelf.keep(f"hidden of group {number}", (*ids_WL.shape, model.config.hidden_size), torch.float32)
        hidden[number].tensor.copy_(model.embed(ids_WL))
    block = model.load_block(0)
    captured = capture(model, block, 0, hidden, architecture, shelf)
    assert device_memory(work, cluster).placed == shelf.bytes_by_place()
    assert Shares(work, cluster).group_tokens == [kept.tensor.shape[:2].numel() for kept in hidden.values()]

    sizes, weights, routers = Shares(work, cluster).group_tokens, {}, []
    for router, group in enumerate(architecture.router_groups):
        inputs_NC = captured.inputs[router].tensor
        fitted = fit_router(job, inputs_NC, sizes, CPU)
        tokens = TokensByExpert(inputs_NC, fitted.labels_N, 3)
        linears = {path: block.get_submodule(path).weight for path in group}
        counts = torch.bincount(fitted.labels_N.long(), minlength=3).tolist()
        [solved] = solve_experts([job], linears, [0, 1, 2], tokens.of, counts)
        weights |= solved.weights
        routers.append(({"weight": fitted.weight_EC, "bias": fitted.bias_E}, fitted.labels_N))
    assert work.expert_bytes == sum(weight_ERC.nbytes for weight_ERC in weights.values())
    dense = {path: block.get_submodule(path).weight for path in weights}
    storage = Storage(str(tmp_path))
    storage.write(0, expert_tensors(forms_of(job, dense, torch.float32), range(3), weights, {}) | router_tensors(architecture.router_groups, routers, 3))
    written = (tmp_path / "layers" / "layer_000.safetensors").stat().st_size
    assert written == pytest.approx(work.shard_bytes, rel=0.01)


def test_activations_lie_where_the_shelf_puts_them():
    """Too little room on the device, then in host memory: what does not fit goes on, in the order in which it is kept."""
    shape = ModelShape.of(config_of("pythia-12b"))
    work = Work(Job(model="x", pca_reduction_factor=8), shape, torch.bfloat16, 128, 2048, 0, 2048)
    cluster = Cluster(1, 1, 25_000_000_000, 24_000_000_000, 1 << 34, 8)
    placed = device_memory(work, cluster).placed
    assert sum(placed.values()) == 128 * 2048 * 2 * (3 * 5120 + 20480)
    assert all(placed.values()) and placed["host"] <= 12_000_000_000


# Memory and time, against an H100


MEASURED_BYTES = {  # of the card, at the peak of a block made by `pipeline.expansion`, without KMeans; expandable segments
    ("pythia-1.4b", 16, 128, 2048): 20.20e9, ("Llama-2-7b", 16, 128, 4096): 44.74e9, ("pythia-12b", 2, 32, 2048): 16.65e9, ("Llama-2-70b", 2, 16, 4096): 31.57e9,
}


def one_block(name: str, experts: int, windows: int, length: int, factor: int = 8) -> Work:
    shape = ModelShape.of(config_of(name, num_hidden_layers=1))
    return Work(Job(model="x", num_clusters=experts, pca_reduction_factor=factor), shape, torch.bfloat16, windows, length, 0, length)


@pytest.mark.parametrize("case", MEASURED_BYTES, ids=lambda case: case[0])
def test_memory_is_within_10_percent_of_what_was_measured(case):
    memory = device_memory(one_block(*case), Cluster(1, 1, CARD, 1 << 37, 1 << 36, 8))
    assert memory.of("solve") == pytest.approx(MEASURED_BYTES[case], rel=0.1)


def gpu_rows() -> dict[str, dict]:
    from tests.benchmarks.conftest import RESULTS

    return {row["what"]: row for row in json.loads((RESULTS / "gpu.json").read_text())["rows"]}


@pytest.mark.parametrize("name, what, windows, length, factor", [
    ("pythia-1.4b", "block, Pythia 1.4B-shaped, 16 experts, 128 x 2048 tokens", 128, 2048, 8),
    ("Llama-2-7b", "block, Llama 2 7B-shaped, 16 experts, 128 x 4096 tokens", 128, 4096, 32)])
def test_seconds_are_within_a_factor_of_what_was_measured(name, what, windows, length, factor):
    """Of a block in one process: nothing passes through an object store."""
    measured = {stage: gpu_rows()[what][stage] for stage in ("capture", "cluster", "solve", "propagate")}
    free = H100.__class__(**H100.__dict__ | dict(store=math.inf, from_device=math.inf, to_device=math.inf))
    plan = estimate(one_block(name, 16, windows, length, factor), Cluster(1, 1, CARD, 1 << 37, 1 << 36, 8), free)
    rows = compared(plan, measured)
    assert [row[0] for row in rows] == [*measured, "sum"]
    for stage, guessed, seconds in rows:
        assert seconds / 1.5 < guessed < seconds * 1.5, f"{stage}\n{describe_comparison(rows)}"


@pytest.mark.parametrize("name, propagation", [("pythia-1.4b", "sparse"), ("pythia-1.4b", "dense"), ("llama-2-7b", "sparse")])
def test_whole_jobs_on_one_gpu(name, propagation):
    """Four blocks with Ray and KMeans: memory within 10 % of torch's own peak, seconds within a factor of 1.5."""
    from tests.benchmarks.conftest import RESULTS

    rows = json.loads((RESULTS / f"several-{name}.json").read_text())["rows"]
    row = next(row for row in rows if row["actors"] == 1 and row["propagation"] == propagation)
    windows, length, factor = (128, 2048, 8) if name == "pythia-1.4b" else (128, 4096, 32)
    config = config_of(next(known for known in SIZES if known.lower() == name), num_hidden_layers=4, vocab_size=512)
    job = Job(model="x", num_clusters=16, pca_reduction_factor=factor, propagation=propagation)
    plan = estimate(Work(job, ModelShape.of(config), torch.bfloat16, windows, length, 0, length), Cluster(1, 1, CARD, NODE, STORE, 8), H100)
    assert max(stage.device for stage in plan.stages.values()) - CONTEXT == pytest.approx(row["device_peak"], rel=0.1)
    seconds = sum(stage.seconds for stage_name, stage in plan.stages.items() if stage_name in MAKING)
    assert row["seconds"] / 1.5 < seconds < row["seconds"] * 1.5


# The command


def planned(*arguments) -> dict:
    outcome = command("plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_70b_on_8_cards_of_80_gb(weightless):
    outcome = command("plan", "--model", weightless("Llama-2-70b"), "--gpus", 8, "--gpu-memory", 80, "--num-clusters", 8, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert result["dense_parameters"] == 68_976_648_192 and result["dtype"] == "bfloat16" and result["windows"] == 128 and result["window_length"] == 4096
    assert result["actors"] == 8 and result["least_device_bytes"] < result["device_has_bytes"]
    assert not any("GPU has" in problem for problem in result["problems"])
    # A shard holds 8 experts of 3 x 8192 x 28672, half of whose weights are kept in 16 bits, and a bit for each; 80 of them and the
    # model do not go onto this machine's disk.
    assert result["disk_bytes"]["shards"] == pytest.approx(80 * 8 * 3 * 8192 * 28672 * 9 / 8, rel=0.01)
    assert "built in" in result["rates"]
    for word in ("69 billion parameters", "propagate", "part, at its peak", "activations", "together", "Disk: "):
        assert word in outcome.out


def test_what_to_change_where_it_does_not_fit(weightless):
    """70B with 64 experts: a block's alone are 90 GB."""
    result = planned("--model", weightless("Llama-2-70b"), "--gpus", 8, "--gpu-memory", 80, "--num-clusters", 64, "--nodes", 2, "--host-memory", 2000)
    assert not result["fits"]
    sentence = next(problem for problem in result["problems"] if problem.startswith("A GPU has 85 GB"))
    assert "even with activations on disk" in sentence and "it would fit with --num-clusters " in sentence
    number = int(sentence.split("--num-clusters ")[1].split()[0].rstrip(".,"))
    changed = planned("--model", weightless("Llama-2-70b"), "--gpus", 8, "--gpu-memory", 80, "--num-clusters", number, "--nodes", 2)
    assert changed["least_device_bytes"] <= changed["device_has_bytes"]


def test_13b_on_one_card_of_80_gb(weightless):
    result = planned("--model", weightless("Llama-2-13b"), "--gpus", 1, "--gpu-memory", 80, "--output-dir", "/dev/shm/run", "--storage", "s3://bucket/run")
    assert result["dense_parameters"] == 13_015_864_320
    assert result["device_bytes"] < result["device_has_bytes"] and result["disk_bytes"]["shards"] == 0
    assert result["activation_bytes"]["host"] == result["activation_bytes"]["disk"] == 0


def test_12b_on_cards_of_24_gb(weightless):
    """One card: activations move to host memory. Several: every actor holds all experts, so there must be fewer."""
    directory = weightless("pythia-12b")
    one = planned("--model", directory, "--gpus", 1, "--gpu-memory", 24, "--host-memory", 128)
    assert one["dense_parameters"] == 11_846_072_320 and one["window_length"] == 2048
    assert one["activation_bytes"]["host"] > one["activation_bytes"]["device"] and one["least_device_bytes"] < one["device_has_bytes"]
    four = planned("--model", directory, "--gpus", 4, "--gpu-memory", 24, "--num-clusters", 4, "--host-memory", 256)
    assert four["least_device_bytes"] < four["device_has_bytes"] and sum(four["activation_bytes"].values()) < sum(one["activation_bytes"].values())


@pytest.mark.slow
def test_on_the_cluster_at_hand(tmp_path, one_ray):
    """A short measurement, then figures of this very machine."""
    save_tiny(tmp_path / "model")
    np.save(tmp_path / "ids.npy", token_windows(160, 64).numpy())
    outcome = command("plan", "--model", tmp_path / "model", "--dataset", tmp_path / "ids.npy", "--num-clusters", 4, "--pca-reduction-factor", 4, "--threads", 1,
                      "--output-dir", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert result["fits"] and "It fits." in outcome.out and "1 CPU thread" in result["rates"] and result["device"] == "cpu"
    assert result["windows"] == 144 and result["evaluation_windows"] == 16  # a tenth is held out
    assert result["disk_has_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert list(tmp_path.glob("*measured*")) == [] and not (tmp_path / "run").exists()
    run = run_job("--model", tmp_path / "model", "--dataset", tmp_path / "ids.npy", "--num-clusters", 4, "--pca-reduction-factor", 4, "--threads", 1,
                  "--output-dir", tmp_path / "run")
    shards = sum(file.stat().st_size for file in (tmp_path / "run" / "layers").glob("*.safetensors"))
    headers = 3 * 1500  # small beside real layers, not beside these
    assert abs(result["disk_bytes"]["shards"] - shards) <= headers + 0.01 * shards
    assert set(result["stages"]) - {"write"} <= set(run["seconds_by_stage"])


OPTIONS = {  # what each changes, compared with the plan without it
    "--dtype float32": lambda with_, without: with_["device_parts"]["dense block"] == 2 * without["device_parts"]["dense block"],
    "--num-clusters 8": lambda with_, without: with_["disk_bytes"]["shards"] < 0.6 * without["disk_bytes"]["shards"],
    "--pca-reduction-factor 64": lambda with_, without: with_["stages"]["cluster"]["moved_bytes"] < without["stages"]["cluster"]["moved_bytes"],
    "--no-pca": lambda with_, without: with_["stages"]["cluster"]["object_store_bytes"] > without["stages"]["cluster"]["object_store_bytes"],
    "--kmeans-restarts 100": lambda with_, without: with_["stages"]["cluster"]["seconds"] > without["stages"]["cluster"]["seconds"],
    "--propagation dense": lambda with_, without: "expand" in with_["stages"] and "expand" not in without["stages"],
    "--dataset c4": lambda with_, without: with_["evaluation_windows"] == 256,
    "--dataset-size 32": lambda with_, without: with_["windows"] == 32,
    "--seq-len 1024": lambda with_, without: with_["window_length"] == 1024,
    "--eval-dataset none": lambda with_, without: "evaluate expanded" not in with_["stages"],
    "--eval-size 10": lambda with_, without: with_["evaluation_windows"] == 10,
    "--no-dense": lambda with_, without: "evaluate dense" not in with_["stages"],
    "--actors 1": lambda with_, without: with_["actors"] == 1 and without["actors"] == 2,
    "--gpus-per-actor 0.5": lambda with_, without: with_["actors"] == 4 and with_["device_has_bytes"] == pytest.approx(without["device_has_bytes"] / 2),
    "--nodes 2": lambda with_, without: with_["stages"]["propagate"]["seconds"] > without["stages"]["propagate"]["seconds"],
    "--host-memory 64": lambda with_, without: with_["host_has_bytes"] == 64 << 30,
    "--activations disk": lambda with_, without: with_["activation_bytes"]["device"] == 0 and with_["disk_bytes"]["activations"] > 0,
    "--activations host": lambda with_, without: with_["activation_bytes"]["host"] > 0 and with_["seconds"] > without["seconds"],
    "--storage s3://bucket/run": lambda with_, without: with_["disk_bytes"]["shards"] == 0,
    "--sparsity 2:4 --quantize --bits 4 --threads 4 --verbose --output-dir /dev/shm": lambda with_, without: with_["disk_has_bytes"] == shutil.disk_usage("/dev/shm").total
    or with_["disk_has_bytes"] != without["disk_has_bytes"],
}


def test_every_option_changes_the_plan(weightless, tmp_path):
    directory = weightless("pythia-1.4b")
    given = ["--model", directory, "--gpus", 2, "--gpu-memory", 80]
    without = planned(*given)
    for options, changed in OPTIONS.items():
        assert changed(planned(*given, *options.split()), without), options
    (tmp_path / "job.yaml").write_text(f"model: {directory}\nnum_clusters: 4\n")
    assert planned("--config", tmp_path / "job.yaml", "--gpus", 2, "--gpu-memory", 80)["disk_bytes"]["shards"] < without["disk_bytes"]["shards"]


BAD = {
    "no model": ("", "--model is missing"),
    "unknown model": ("--model ./missing --gpus 1 --gpu-memory 80", "--model ./missing is no directory"),
    "not cached": ("--model some/model --gpus 1 --gpu-memory 80", "--model some/model is neither a local directory nor in the cache"),
    "pythia not cached": ("--model pythia --model-size 12b --revision step1 --cache-dir {dir}/none --gpus 1 --gpu-memory 80", "EleutherAI/pythia-12b-deduped is neither"),
    "no config": ("--model {dir} --gpus 1 --gpu-memory 80", "holds no config.json"),
    "one of two": ("--model {model} --gpus 8", "--gpus and --gpu-memory describe a cluster together"),
    "nodes alone": ("--model {model} --nodes 2", "--gpus and --gpu-memory describe a cluster together"),
    "no gpus": ("--model {model} --gpus 0 --gpu-memory 80", "--gpus is 0; allowed is a number above 0"),
    "no memory": ("--model {model} --gpus 1 --gpu-memory=-1", "--gpu-memory is -1; allowed is"),
    "uneven": ("--model {model} --gpus 8 --gpu-memory 80 --nodes 3", "--nodes is 3, but it does not divide --gpus 8"),
    "many actors": ("--model {model} --gpus 2 --gpu-memory 80 --actors 3", "--actors is 3, but --gpus 2 hold 2 at most"),
    "two clusters": ("--model {model} --gpus 2 --gpu-memory 80 --address auto", "--address auto is a cluster at hand"),
    "no such data": ("--model {model} --gpus 1 --gpu-memory 80 --eval-dataset wikitext3", "--eval-dataset wikitext3 is no file"),
    "no windows": ("--model {model} --gpus 1 --gpu-memory 80 --dataset {model}/config.npy", "holds no token windows"),
    "wide factor": ("--model {model} --gpus 1 --gpu-memory 80 --pca-reduction-factor 9999", "--pca-reduction-factor is 9999"),
    "long window": ("--model {model} --gpus 1 --gpu-memory 80 --seq-len 9999", "--seq-len is 9999, but the context"),
}


def test_bad_values_are_one_sentence(weightless, tmp_path):
    directory = weightless("pythia-1.4b")
    for case, (options, message) in BAD.items():
        outcome = command("plan", *options.replace("{model}", str(directory)).replace("{dir}", str(tmp_path)).split())
        assert outcome.code == 2 and outcome.err.startswith("Error: ") and message in outcome.err, (case, outcome.err)
        assert len(outcome.err.strip().splitlines()) == 1, case


# What run refuses


def test_run_refuses_what_the_disk_cannot_hold(tmp_path, one_ray):
    """A small model of so many experts that their shards exceed what this disk really has free."""
    save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=4096, num_hidden_layers=3, max_position_embeddings=4096)
    free = shutil.disk_usage(tmp_path).free
    experts = math.ceil(free / (2 * 3 * 2 * 256 * 4096 * 4) * 2.4)  # half of the weights are kept, with a bit for each
    np.save(tmp_path / "ids.npy", token_windows(max(2, 2 * experts // 4096), 4096).numpy())
    outcome = command("run", "--model", tmp_path / "model", "--dataset", tmp_path / "ids.npy", "--eval-dataset", "none", "--num-clusters", experts,
                      "--output-dir", tmp_path / "run")
    assert outcome.code == 2, outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("Error: --output-dir has ") and "are needed (shards" in last and "fewer --num-clusters" in last
    assert not (tmp_path / "run" / "layers").is_dir()


def test_only_what_has_no_way_out_is_refused():
    """Activations that fit nowhere but on disk are none of it; nor is what lacks a little, since a prediction may err."""
    work = one_block("Llama-2-70b", 16, 128, 4096)
    least = least_device_memory(work, Cluster(1, 1, CARD, 1 << 40, 1 << 38, 8))
    for gpu_bytes, fatal in ((int(least * 1.01), False), (int(least * 0.95), False), (int(least * 0.8), True)):
        plan = estimate(work, Cluster(1, 1, gpu_bytes, 1 << 40, 1 << 38, 8, 1 << 50), H100)
        assert any(problem.fatal for problem in problems(plan)) == fatal


# The schedule's model


def test_predicted_seconds_follow_the_schedule():
    shape = ModelShape.of(config_of("Llama-2-7b"))
    dense = Work(Job(model="x", pca_reduction_factor=32, propagation="dense"), shape, torch.bfloat16, 128, 4096, 0, 4096)
    points = {point.gpus: point for point in predicted(dense, H100, (1, 2, 4, 8, 32, 64), writing=False)}
    expand = {gpus: point.stages["expand"] for gpus, point in points.items()}
    assert 1.8 < expand[1] / expand[2] <= 2.1 and 3.5 < expand[1] / expand[4] <= 4.3  # blocks do not wait for each other
    assert expand[64] == pytest.approx(expand[32])  # there are 32 blocks
    assert points[1].stages["dense pass"] == 0 < points[8].stages["dense pass"]


def test_whole_experts_bound_the_solve():
    """Three experts of two routers, on so many actors as there are tasks and on more."""
    shape = ModelShape.of(config_of("Llama-2-7b"))
    fast = Rates(**H100.__dict__ | dict(store=math.inf, from_device=math.inf, to_device=math.inf))
    work = Work(Job(model="x", num_clusters=3, pca_reduction_factor=32), shape, torch.bfloat16, 128, 4096, 0, 4096)
    seconds = {actors: estimate(work, Cluster(actors, 1, CARD, 1 << 41, 1 << 40, 8), fast).stages["solve"].seconds for actors in (1, 3, 6, 12)}
    assert seconds[1] > 1.9 * seconds[3] and seconds[1] > 2 * seconds[6] and seconds[12] == pytest.approx(seconds[6], rel=0.05)
    tasks = Shares(work, Cluster(12, 1, CARD, 1 << 41, 1 << 40, 8)).tasks
    assert sum(len(dealt) > 0 for dealt in tasks) == 6
