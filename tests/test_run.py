"""A whole job on the embedded model: what it prints, what it leaves, and the saved model without this project."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from pipeline.demo import DEMO_MODEL
from tests.conftest import command, run_job
from tests.packed import shard_experts

OPTIONS = ("--model", DEMO_MODEL, "--dataset", "self", "--dataset-size", 16, "--eval-size", 6, "--seq-len", 64, "--num-clusters", 4,
           "--sparsity", "0.6", "--kmeans-restarts", 2)

pytestmark = pytest.mark.usefixtures("one_ray")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "job"
    return directory, run_job(*OPTIONS, "--profile", "--output-dir", directory)


def without_the_project(script: str, cwd, tmp_path) -> str:
    """Run a script in a process that cannot import this project or Ray."""
    hide = "import sys\nfor name in ('pipeline', 'actors', 'cli', 'ray'): sys.modules[name] = None\n"
    finished = subprocess.run([sys.executable, "-c", hide + script], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_result(run):
    directory, result = run
    assert result["windows"] == 6 and result["window_length"] == 64 and result["num_clusters"] == 4
    assert 1 < result["dense_perplexity"] < result["perplexity"] < 2048
    assert result["measured_sparsity"] == pytest.approx(0.6, abs=0.001)
    assert "self: sampled from the model, seed 1" in result["measured_on"] and "per token" in result["measured_on"]
    assert set(result["seconds_by_stage"]) >= {"start", "sample", "capture", "cluster", "solve", "write", "propagate", "assemble", "evaluate expanded"}
    assert sum(result["seconds_by_stage"].values()) <= result["seconds"]
    assert result["model_dir"] == str(directory / "model") and result["warnings"] == []


def test_files(run):
    directory, result = run
    assert sorted(file.name for file in directory.iterdir()) == [".lock", "config.yaml", "layers", "manifest.json", "model", "profile", "progress.json", "stats", "windows"]
    weight, dense = torch.from_numpy(shard_experts(directory / "layers" / "layer_002.safetensors", "mlp.dense_h_to_4h", "0.6")), load_file(DEMO_MODEL / "model.safetensors")["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"]
    assert weight.shape == (4, *dense.shape) and (weight == 0).float().mean(dim=(1, 2)).tolist() == pytest.approx([0.6] * 4, abs=0.002)
    table = parquet.read_table(directory / "stats" / "experts.parquet").to_pandas()
    assert len(table) == 4 * 2 * 4 and (table.groupby(["layer", "linear"]).tokens.sum() == 16 * 64).all()
    card = (directory / "model" / "README.md").read_text()
    assert f"{result['perplexity']:.3f}" in card and f"{result['dense_perplexity']:.3f}" in card and result["measured_on"] in card


def test_profile(run):
    """The timeline holds the driver's stages and what the actor did meanwhile; the table adds up to the stages' seconds."""
    directory, result = run
    events = json.loads((directory / "profile" / "timeline.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(rows.values()) == ["actor 0", "actor 0, files", "driver"]
    calls = [(rows[event["tid"]], event["name"], event["args"]["of"]) for event in events if event["ph"] == "X"]
    for layer in range(1, 5):
        of = f"layer {layer} of 4"
        assert {("driver", "cluster", of), ("driver", "solve", of), ("actor 0", "capture", of), ("actor 0", "play", of), ("actor 0", "propagate", of)} <= set(calls)
    assert sum(name == "write" and row == "actor 0, files" for row, name, _ in calls) == 4
    runs = [event["dur"] for event in events if event["name"] == "play"]
    assert 0 < sum(runs) / 1e6 <= result["seconds_by_stage"]["cluster"] + 0.1
    lines = (directory / "profile" / "stages.txt").read_text().splitlines()
    table = {line.rsplit(maxsplit=4)[0]: float(line.rsplit(maxsplit=4)[2]) for line in lines[2:]}
    assert table["solve"] == pytest.approx(result["seconds_by_stage"]["solve"], abs=0.01)
    assert result["profile"].splitlines() == lines and (directory / "profile" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_saved_model_without_the_project(run, tmp_path):
    directory, result = run
    out = without_the_project(f"""
import json, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained({str(directory / 'model')!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(directory / 'model')!r}, trust_remote_code=True)
ids = load_file({str(directory / 'windows' / 'evaluation.safetensors')!r})['ids']
with torch.no_grad():
    losses = [model(ids[i:i+1], labels=ids[i:i+1]).loss.double() for i in range(len(ids))]
prompt = tokenizer("It was a", return_tensors="pt")
greedy = model.generate(**prompt, max_new_tokens=8, do_sample=False)
no_cache = model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False)
tokenizer.pad_token = tokenizer.eos_token
both = tokenizer(["It was a", "The old man said that"], return_tensors="pt", padding=True, padding_side="left")
batch = model.generate(**both, max_new_tokens=4, num_beams=2)
print(json.dumps(dict(perplexity=float(torch.stack(losses).mean().exp()), same=greedy.tolist() == no_cache.tolist(), text=tokenizer.decode(greedy[0]),
                      batch=list(batch.shape), experts=model.config.num_experts, hidden=model.config.hidden_size)))
""", tmp_path, tmp_path)
    reloaded = json.loads(out.strip().splitlines()[-1])
    assert reloaded["perplexity"] == pytest.approx(result["perplexity"], rel=1e-3)
    assert reloaded["same"] and reloaded["text"].startswith("It was a") and len(reloaded["text"]) > 10
    assert reloaded["batch"][0] == 2 and reloaded["experts"] == 4 and reloaded["hidden"] == 256


def test_eval_of_saved_and_dense(run, tmp_path):
    directory, result = run
    np.save(tmp_path / "ids.npy", load_file(directory / "windows" / "evaluation.safetensors")["ids"].numpy())
    outcome = command("eval", "--model", directory / "model", "--eval-dataset", tmp_path / "ids.npy", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    assert f"Perplexity: per token, ids.npy (sha256 {outcome.json['measured_on'].split('sha256 ')[1][:12]}), 6 windows of 64 tokens, float32" in outcome.out
    dense = command("eval", "--model", "demo", "--eval-dataset", tmp_path / "ids.npy", "--json").json
    assert dense["perplexity"] == dense["dense_perplexity"] == pytest.approx(result["dense_perplexity"], rel=1e-6)


def test_perplexity_is_exp_of_the_mean_window_loss(run):
    """Against transformers' own loss on the dense model."""
    from transformers import AutoModelForCausalLM

    directory, result = run
    ids = load_file(directory / "windows" / "evaluation.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in ids]
    assert result["dense_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_the_saved_config_is_the_job(run, tmp_path):
    """Given back as --config, with --resume require, everything is there already; the command line wins over it."""
    directory, result = run
    outcome = command("run", "--config", directory / "config.yaml", "--resume", "require", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["layers_resumed"] == 4 and outcome.json["perplexity"] == result["perplexity"]
    assert not {"capture", "solve", "assemble", "evaluate dense"} & outcome.json["seconds_by_stage"].keys()
    other = command("run", "--config", directory / "config.yaml", "--sparsity", "0.7")
    assert other.code == 2 and "holds another job: it differs in sparsity (0.6 there, 0.7 here)" in other.err


def test_status(run):
    directory, result = run
    status = command("status", directory, "--json")
    assert status.code == 0 and "finished, 4 of 4 layers done" in status.out
    assert status.json["layers_left"] == [] and status.json["perplexity"] == result["perplexity"] and status.json["model_dir"] == result["model_dir"]


def test_quantized(tmp_path):
    """2:4 with 4 bits in one pass: every kept weight on the dense row's 16-level grid, two of four kept at most."""
    result = run_job("--model", "demo", "--dataset", "self", "--dataset-size", 6, "--seq-len", 32, "--eval-dataset", "none", "--num-clusters", 2,
                     "--sparsity", "(2, 4)", "--quantize", "--bits", 4, "--kmeans-restarts", 1, "--output-dir", tmp_path / "job")
    assert result["perplexity"] is None and result["dense_perplexity"] is None and result["sparsity"] == "2:4"
    weight = torch.from_numpy(shard_experts(tmp_path / "job" / "layers" / "layer_000.safetensors", "mlp.dense_4h_to_h", "2:4", 4))
    assert ((weight.view(2, 256, -1, 4) != 0).sum(-1) <= 2).all()
    assert max(len(weight[:, row].unique()) for row in range(256)) <= 16
