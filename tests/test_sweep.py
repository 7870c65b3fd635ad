"""A sweep: the same bytes as single runs, what is shared made once, resumed wherever it stopped, and a table and a plot at the end."""

import json
import shutil
import signal
from collections import Counter

import matplotlib.image
import pytest
from pyarrow import parquet

from actors import demo
from actors.conductor import Conductor
from pipeline.errors import UserError
from pipeline.grid import make_grid, name_of
from pipeline.sweep import make_rows
from pipeline.sweep_plot import sweep_figure
from tests.conftest import Outcome, command, run_job, start_command
from tests.jobs import LAYERS, assert_gone, make_inputs, shard_hashes, wait_for_stage

NAMES = ["0.5-k3", "0.5-k3-dense", "0.5-k1", "0.5-k1-dense", "2of4-k3", "2of4-k3-dense", "2of4-k1", "2of4-k1-dense"]
GRID = ("--num-clusters", 1, "--sparsity", 0.5, "--sparsity", "2:4", "--propagation", "sparse", "--propagation", "dense")  # beside the job's 3 clusters

pytestmark = pytest.mark.usefixtures("one_ray")


def sweep(*arguments) -> Outcome:
    outcome = command("sweep", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome


def rows_of(directory) -> dict[str, dict]:
    return {row["directory"]: row for row in parquet.read_table(directory / "sweep.parquet").to_pylist()}


@pytest.fixture(scope="module")
def swept(job, tmp_path_factory):
    directory = tmp_path_factory.mktemp("swept") / "sweep"
    return directory, sweep(*job, *GRID, "--output-dir", directory, "--profile")


@pytest.fixture
def finished(swept, tmp_path):
    """A finished sweep's directory, to be spoilt."""
    shutil.copytree(swept[0], tmp_path / "sweep")
    return tmp_path / "sweep"


# The grid


def test_grid_is_the_product():
    grid = make_grid({"model": "demo", "sparsity": ["0.5", "2:4", "0.50"], "num_clusters": (1, 16), "seed": [0, 1], "bits": None, "output_dir": "runs/a"})
    assert [name_of(job) for job in grid] == ["0.5-k1", "0.5-k1-seed1", "0.5-k16", "0.5-k16-seed1", "2of4-k1", "2of4-k1-seed1", "2of4-k16", "2of4-k16-seed1"]
    assert {job.output_dir for job in grid} == {"runs/a"}


def test_grid_of_a_file(tmp_path):
    """Quantized or not is an axis of the file, and what goes only with it is left out without it; 2:4 needs no quotes; the command line wins."""
    (tmp_path / "sweep.yaml").write_text("model: demo\nsparsity: [0.5, 2:4]\nquantize: [false, true]\nbits: [4, 3]\nmse: true\nnum-clusters: [1, 2]\n")
    grid = make_grid({"num_clusters": [8]}, str(tmp_path / "sweep.yaml"))
    assert [name_of(job) for job in grid] == ["0.5-k8", "0.5-4bit-k8", "0.5-3bit-k8", "2of4-k8", "2of4-4bit-k8", "2of4-3bit-k8"]
    assert [job.mse for job in grid] == [False, True, True] * 2


# What comes out


def test_every_job_is_as_if_run_alone(job, swept, undisturbed, tmp_path):
    directory, outcome = swept
    rows = {row["directory"]: row for row in outcome.json["rows"]}
    assert list(rows) == NAMES
    assert shard_hashes(directory / "0.5-k3") == shard_hashes(undisturbed[0]) and rows["0.5-k3"]["perplexity"] == undisturbed[1]["perplexity"]
    for name, options in (("2of4-k3-dense", ("--propagation", "dense")), ("2of4-k3", ())):
        result = run_job(*job, "--sparsity", "2:4", *options, "--output-dir", tmp_path / name)
        assert shard_hashes(directory / name) == shard_hashes(tmp_path / name)
        assert (rows[name]["perplexity"], rows[name]["dense_perplexity"]) == (result["perplexity"], result["dense_perplexity"])
    # and is a run directory like any other
    shutil.copytree(directory / "2of4-k1-dense", tmp_path / "alone")
    alone = run_job("--config", tmp_path / "alone" / "config.yaml", "--output-dir", tmp_path / "alone", "--resume", "require")
    assert alone["layers_resumed"] == LAYERS and alone["perplexity"] == rows["2of4-k1-dense"]["perplexity"]


def test_what_jobs_share_is_made_once(swept):
    """By the calls of the actor, as Ray saw them."""
    events = json.loads((swept[0] / "profile" / "timeline.json").read_text())["traceEvents"]
    calls = Counter((event["name"], event["args"]["of"]) for event in events if event["ph"] == "X" and event["args"])
    of = Counter(event["name"] for event in events if event["ph"] == "X")
    routers = 2
    assert calls["project", "layer 1 of 3"] == routers, "the first block's routers of equal k serve both sparsities"
    assert calls["project", "layer 2 of 3"] == 2 * routers
    assert of["expand_alone"] == LAYERS and of["load"] == 1, "four jobs of dense propagation in one pass"
    assert of["evaluate_block"] == (len(NAMES) + 1) * LAYERS, "the dense model is judged once"


def test_table(swept):
    directory, outcome = swept
    rows = rows_of(directory)
    assert list(rows.values()) == outcome.json["rows"]
    for name, row in rows.items():
        status = command("status", directory / name, "--json").json
        assert row["perplexity"] == status["perplexity"] and row["seconds"] == pytest.approx(status["seconds"], abs=0.01)
        assert row["ratio"] == row["perplexity"] / row["dense_perplexity"] and row["error"] is None and row["warnings"] == 0
        assert row["measured_sparsity"] == pytest.approx(row["fraction"], abs=0.01) and row["bits"] is None and row["seed"] == 0
    assert rows["0.5-k1-dense"]["against_sparse"] == rows["0.5-k1-dense"]["perplexity"] - rows["0.5-k1"]["perplexity"]
    assert rows["0.5-k1"]["against_sparse"] is None
    row = rows["2of4-k3-dense"]
    shown = f"| 2:4 | 3 | dense | {row['perplexity']:.2f} | {row['dense_perplexity']:.2f} | {row['ratio']:.3f} | {row['against_sparse']:+.2f} | 50.00% | 0 |"
    markdown = (directory / "sweep.md").read_text()
    assert shown in markdown and "| against sparse propagation |" in markdown and "![Perplexity against sparsity](sweep.png)" in markdown
    assert f"Perplexity: {outcome.json['measured_on'][0]}." in markdown and outcome.json["measured_on"][0].startswith("per token, evaluation.npy")
    assert f"2:4       3        dense        {row['perplexity']:.2f}" in outcome.out and "0 of 8 jobs were finished before" in outcome.out


def test_plot(swept):
    assert matplotlib.image.imread(swept[0] / "sweep.png").shape[0] > 500
    figure = sweep_figure(swept[1].json)
    [panel] = figure.axes
    assert panel.get_xlabel() == "share of feed-forward weights pruned" and "per token (exp of the mean window loss)" in panel.get_ylabel()
    dense = swept[1].json["rows"][0]["dense_perplexity"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1 expert", "3 experts", "dense propagation", "N kept of every M", "N kept of every M, dense propagation", f"dense model, {dense:.2f}"]
    assert [text.get_text() for text in panel.texts] == ["2:4"]
    assert Counter(container.lines[0].get_linestyle() for container in panel.containers) == {"-": 2, "--": 2, "None": 4}


def test_plot_of_seeds_and_bits():
    """A panel for each number of bits; the mean of the seeds, with bars from the least to the greatest."""
    jobs = make_grid({"model": "demo", "sparsity": ["0.5", "0.9"], "quantize": [False, True], "bits": [4], "seed": [0, 1, 2], "num_clusters": 2})
    rows = make_rows(jobs, [{"perplexity": 20.0 + job.seed + 100 * (job.sparsity == "0.9"), "warnings": []} for job in jobs], {})
    figure = sweep_figure({"model": "demo", "rows": rows, "measured_on": []})
    assert [panel.get_title() for panel in figure.axes] == ["not quantized", "4 bits"]
    [container] = figure.axes[0].containers
    assert container.lines[0].get_ydata().tolist() == [21, 121] and container.has_yerr
    assert [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()] == [[20, 22], [120, 122]]
    assert figure.axes[0].get_yscale() == "log" and "least to greatest of the seeds" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.slow
def test_seeds_bits_and_storage(tmp_path):
    """Windows sampled from the model: once for each seed and kind, in the storage that is given a place for each job. Again without Ray."""
    model = make_inputs(tmp_path)[1]
    options = ("--model", model, "--dataset", "self", "--dataset-size", 4, "--eval-size", 2, "--seq-len", 16, "--quantize", "--bits", 4, "--bits", 3,
               "--seed", 0, "--seed", 1, "--num-clusters", 1, "--no-dense", "--storage", tmp_path / "shards", "--output-dir", tmp_path / "sweep")
    outcome = sweep(*options)
    names = ["0.5-4bit-k1", "0.5-4bit-k1-seed1", "0.5-3bit-k1", "0.5-3bit-k1-seed1"]
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == sorted(names)
    assert outcome.err.count("sample windows") == 4
    rows = outcome.json["rows"]
    assert [(row["directory"], row["bits"], row["seed"], row["dense_perplexity"], row["ratio"]) for row in rows] == [
        (name, bits, seed, None, None) for name, bits, seed in zip(names, (4, 4, 3, 3), (0, 1, 0, 1))]
    windows = [[(tmp_path / "sweep" / name / "windows" / f"{kind}.safetensors").read_bytes() for kind in ("calibration", "evaluation")] for name in names]
    assert windows[0] == windows[2] != windows[1] == windows[3] and len(outcome.json["measured_on"]) == 2
    again = sweep(*options)
    assert again.json["rows"] == rows and again.json["finished_before"] == 4 and again.err == ""


# Resume


def test_a_finished_sweep_needs_no_ray(job, swept, monkeypatch):
    monkeypatch.setattr("actors.sweeps.performing", None)
    assert sweep(*job, *GRID, "--output-dir", swept[0]).json["rows"] == swept[1].json["rows"]


def test_only_what_is_missing_is_made(job, finished, swept):
    """A job is gone, another lacks its model, and the grid has grown."""
    shutil.rmtree(finished / "0.5-k3-dense")
    shutil.rmtree(finished / "2of4-k1" / "model")
    outcome = sweep(*job, *GRID, "--sparsity", 0.7, "--num-clusters", 1, "--output-dir", finished)
    assert outcome.json["finished_before"] == 6 and len(outcome.json["rows"]) == 12
    assert [shard_hashes(finished / name) for name in NAMES] == [shard_hashes(swept[0] / name) for name in NAMES]
    assert "evaluate dense" not in outcome.err and "0.5-k3-dense, 0.7-k3-dense, 0.7-k1-dense together\n" in outcome.err
    assert f"{finished}/2of4-k1/model/config.json is missing; the model is assembled again" in outcome.err
    assert "\n0.5-k1\n" not in outcome.err
    before, after = ({name: row["perplexity"] for name, row in rows_of(directory).items()} for directory in (swept[0], finished))
    assert before.items() <= after.items()


@pytest.mark.slow
def test_a_killed_driver(job, swept, tmp_path):
    """In the pass of the jobs that go through the blocks together, after another was finished."""
    process = start_command("sweep", *job, *GRID, "--output-dir", tmp_path / "sweep")
    try:
        pids = wait_for_stage(process, "expand layer 3", 0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert_gone(pids)
    assert not (tmp_path / "sweep" / "sweep.parquet").exists()
    outcome = sweep(*job, *GRID, "--output-dir", tmp_path / "sweep", "--resume", "require")
    assert outcome.json["finished_before"] == 1 and "expand layer 1" not in outcome.err
    assert [shard_hashes(tmp_path / "sweep" / name) for name in NAMES] == [shard_hashes(swept[0] / name) for name in NAMES]
    assert not list((tmp_path / "sweep").rglob("*.tmp-*"))


@pytest.mark.slow
def test_never_starts_over(job, finished, swept):
    options = (*job[:6], "--num-clusters", 1, "--pca-reduction-factor", 4, "--kmeans-restarts", 2, "--threads", 1)
    outcome = sweep(*options, "--output-dir", finished, "--resume", "never")
    assert outcome.json["finished_before"] == 0 and "solve layer 1" in outcome.err and "evaluate dense" in outcome.err
    assert shard_hashes(finished / "0.5-k1") == shard_hashes(swept[0] / "0.5-k1")


@pytest.mark.slow
def test_a_job_that_fails_does_not_keep_the_others(job, tmp_path, monkeypatch):
    """Together they fail, so each gets a turn of its own; the one that fails again is named."""
    expand = Conductor.expand

    def fails(self, jobs, *rest):
        if any(one.sparsity == "0.6" for one, _ in jobs):
            raise UserError("Expand layer 2 of 3: out of memory.")
        expand(self, jobs, *rest)

    monkeypatch.setattr(Conductor, "expand", fails)
    outcome = command("sweep", *job, "--propagation", "dense", "--sparsity", 0.5, "--sparsity", 0.6, "--sparsity", 0.7, "--output-dir", tmp_path / "sweep")
    sentence = "0.6-k3-dense failed: Expand layer 2 of 3: out of memory."
    assert outcome.code == 2 and outcome.err.strip().splitlines()[-1] == f"Error: {sentence}"
    rows = rows_of(tmp_path / "sweep")
    assert rows["0.6-k3-dense"]["error"] == "Expand layer 2 of 3: out of memory." and rows["0.6-k3-dense"]["perplexity"] is None
    assert rows["0.5-k3-dense"]["perplexity"] and rows["0.7-k3-dense"]["perplexity"]
    markdown = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| 0.6 | 3 | failed |" in markdown and sentence in markdown


# What a user can get wrong


CASES = {
    "one of several": ("--sparsity 0.5 --sparsity 1.5", "--sparsity is '1.5'; allowed is a fraction from 0"),
    "clusters": ("--num-clusters 1 --num-clusters 0", "--num-clusters is 0; allowed is a whole number from 1"),
    "propagation": ("--propagation both", "--propagation is 'both'; allowed is sparse or dense"),
    "bits alone": ("--bits 4 --bits 3", "--bits is 4, but without --quantize nothing is rounded"),
    "nothing to do": ("--sparsity 0 --sparsity 0.5", "--sparsity is 0 and --quantize is not given"),
    "last does not divide": ("--sparsity 0.5 --sparsity 2:5", "--sparsity is 2:5, but mlp.dense_h_to_4h has 32 in features"),
    "more clusters than tokens": ("--num-clusters 1 --num-clusters 99999", "--num-clusters is 99999, but the calibration windows hold 10240 tokens"),
    "no axis": ("--config {dir}/dataset.yaml", "--seq-len is [16, 32]; allowed is a whole number from 2"),
    "empty": ("--config {dir}/empty.yaml", "--sparsity is []; allowed is a fraction"),
    "no evaluation": ("--eval-dataset none", "--eval-dataset is none, but a sweep compares perplexities"),
    "nothing to resume": ("--resume require", "--resume is require, but --output-dir {dir}/sweep holds none of the sweep's jobs"),
    "a run directory": ("--output-dir {run}", "--output-dir {run} holds a job; a sweep needs a directory of its own"),
    "model": ("--model ./missing", "--model ./missing is no directory"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(case, job, undisturbed, tmp_path):
    (tmp_path / "dataset.yaml").write_text("seq-len: [16, 32]\n")
    (tmp_path / "empty.yaml").write_text("sparsity: []\n")
    options, message = (text.replace("{dir}", str(tmp_path)).replace("{run}", str(undisturbed[0])) for text in CASES[case])
    outcome = command("sweep", *job, "--output-dir", tmp_path / "sweep", *options.split())
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 2 and len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0], outcome.err
    assert not (tmp_path / "sweep").exists()


def test_another_sweep_is_refused(job, swept):
    outcome = command("sweep", *job, *GRID, "--kmeans-restarts", 3, "--output-dir", swept[0])
    assert outcome.code == 2 and f"--output-dir {swept[0]}/0.5-k3 holds another job: it differs in kmeans_restarts (2 there, 3 here)" in outcome.err


def test_what_is_submitted_is_checked_here_first():
    def submitted(*options) -> str:
        outcome = command("submit", "--address", "http://127.0.0.1:9", "--", "sweep", "--model", "demo", *options)
        assert outcome.code == 2
        return outcome.err

    assert "--sparsity is '2'; allowed is a fraction" in submitted("--sparsity", 0.5, "--sparsity", 2, "--output-dir", "/shared/a")
    assert "--output-dir is a; for a submitted job allowed is an absolute path" in submitted("--sparsity", 0.5, "--output-dir", "a")
    assert "--address 127.0.0.1:9 cannot be reached" in submitted("--sparsity", 0.5, "--sparsity", 0.8, "--output-dir", "/shared/a")


# The demo, which goes the same way


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "OPTIONS", demo.OPTIONS | dict(dataset_size=4, eval_size=2, seq_len=32, kmeans_restarts=1))
    outcome = command("demo", "--output-dir", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    one, eight = outcome.json["runs"]
    assert (one["num_clusters"], eight["num_clusters"]) == (1, 8) and outcome.json["perplexity"] == eight["perplexity"]
    assert outcome.err.count("evaluate dense layer 1") == 1 and one["dense_perplexity"] == eight["dense_perplexity"]
    assert one["seconds"] + eight["seconds"] <= outcome.json["seconds"] and f"Saved in {tmp_path}/k8/model" in outcome.out
