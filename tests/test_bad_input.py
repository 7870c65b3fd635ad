"""What a user can get wrong: one sentence that names the option and what is allowed, exit code 2, before Ray starts."""

import numpy as np
import pytest
import ray

from tests.conftest import command
from tests.models import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bad")
    save_tiny(directory / "model")
    np.save(directory / "ids.npy", np.random.default_rng(0).integers(0, 96, (8, 16)))
    (directory / "empty.txt").touch()
    (directory / "nothing").mkdir()
    (directory / "no_weights").mkdir()
    (directory / "no_weights" / "config.json").write_text((directory / "model" / "config.json").read_text())
    (directory / "mamba").mkdir()
    (directory / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text("{")
    (directory / "damaged").mkdir()
    (directory / "damaged" / "config.json").write_text((directory / "model" / "config.json").read_text())
    (directory / "damaged" / "model.safetensors").write_bytes((directory / "model" / "model.safetensors").read_bytes()[:5000])
    (directory / "job.yaml").write_text("sparsity: 0.5\nsparsety: 0.5\n")
    (directory / "list.yaml").write_text("- 1\n")
    (directory / "frozen").mkdir()
    (directory / "frozen" / "file").touch()
    return directory


CASES = {
    "sparsity 1": ("--sparsity 1.0", "--sparsity is '1.0'; allowed is a fraction from 0"),
    "sparsity negative": ("--sparsity=-0.1", "--sparsity is '-0.1'; allowed is a fraction"),
    "sparsity 4:2": ("--sparsity 4:2", "--sparsity is '4:2'; allowed is"),
    "sparsity 0:4": ("--sparsity 0:4", "--sparsity is '0:4'; allowed is"),
    "sparsity abc": ("--sparsity abc", "--sparsity is 'abc'; allowed is"),
    "sparsity does not divide": ("--sparsity 2:5", "--sparsity is 2:5, but mlp.dense_h_to_4h has 32 in features, which 5 does not divide"),
    "nothing to do": ("--sparsity 0", "--sparsity is 0 and --quantize is not given"),
    "bits 0": ("--quantize --bits 0", "--bits is 0; allowed is a whole number from 2 to 8"),
    "bits 9": ("--quantize --bits 9", "--bits is 9; allowed is"),
    "bits alone": ("--bits 4", "--bits is 4, but without --quantize nothing is rounded"),
    "group alone": ("--group-size 8", "--group-size is 8, but without --quantize"),
    "symmetric alone": ("--symmetric", "--symmetric is True, but without --quantize"),
    "mse alone": ("--mse", "--mse is True, but without --quantize"),
    "group 0": ("--quantize --group-size 0", "--group-size is 0; allowed is a whole number from 1"),
    "group wide": ("--quantize --group-size 65", "--group-size is 65, but mlp.dense_h_to_4h has 32 in features"),
    "clusters 0": ("--num-clusters 0", "--num-clusters is 0; allowed is a whole number from 1"),
    "clusters many": ("--num-clusters 500", "--num-clusters is 500, but the calibration windows hold 112 tokens"),
    "restarts 0": ("--kmeans-restarts 0", "--kmeans-restarts is 0; allowed is"),
    "factor 0": ("--pca-reduction-factor 0", "--pca-reduction-factor is 0; allowed is"),
    "factor wide": ("--pca-reduction-factor 33", "--pca-reduction-factor is 33, but mlp.dense_h_to_4h has 32 in features"),
    "factor without PCA": ("--no-pca --pca-reduction-factor 8", "--pca-reduction-factor is 8, but --no-pca leaves nothing to reduce"),
    "model unknown": ("--model pythai", "--model 'pythai' is not known: give a hub id"),
    "model missing": ("--model ./missing", "--model ./missing is no directory"),
    "model not cached": ("--model some/model", "--model some/model is neither a local directory nor in the cache, and HF_HUB_OFFLINE is set"),
    "model empty": ("--model {dir}/nothing", "holds no config.json"),
    "model without weights": ("--model {dir}/no_weights", "no_weights holds no safetensors"),
    "model type": ("--model {dir}/mamba", "is of type 'mamba', which is not known here; known types are gpt_neox, llama"),
    "model broken": ("--model {dir}/broken", "broken/config.json is damaged"),
    "model damaged": ("--model {dir}/damaged", "damaged/model.safetensors is damaged"),
    "size unknown": ("--model pythia --model-size 13b", "--model-size is '13b'; with --model pythia it is one of 14m, 31m"),
    "size missing": ("--model llama", "--model-size is None; with --model llama it is one of 2-7b"),
    "size alone": ("--model-size 70m", "--model-size is '70m', but it goes only with --model pythia or --model llama"),
    "revision of a directory": ("--revision main", "--revision is 'main', but --model"),
    "dtype": ("--dtype int8", "--dtype is 'int8'; allowed is auto, float32"),
    "dataset unknown": ("--dataset wikitext3", "--dataset wikitext3 is no file on this machine and no known data set (wikitext2, c4, ptb, self"),
    "dataset missing": ("--dataset {dir}/a.txt", "a.txt is no file on this machine"),
    "dataset array missing": ("--dataset {dir}/a.npy", "a.npy is no file on this machine"),
    "dataset empty": ("--dataset {dir}/empty.txt --eval-dataset none", "empty.txt is empty"),
    "dataset small": ("--dataset-size 9", "--dataset-size is 9, but"),
    "evaluation missing": ("--eval-dataset {dir}/b.txt", "--eval-dataset {dir}/b.txt is no file"),
    "window long": ("--dataset self --seq-len 65", "--seq-len is 65, but the context of --model"),
    "window other": ("--seq-len 32", "--seq-len is 32, but the windows of --dataset"),
    "window 1": ("--seq-len 1", "--seq-len is 1; allowed is a whole number from 2"),
    "seed": ("--seed=-1", "--seed is -1; allowed is"),
    "output a file": ("--output-dir {dir}/empty.txt/run", "--output-dir {dir}/empty.txt/run cannot be written"),
    "output no job": ("--output-dir {dir}/frozen", "--output-dir {dir}/frozen holds files that are no job's"),
    "resume": ("--resume maybe", "--resume is 'maybe'; allowed is auto, require or never"),
    "resume nothing": ("--resume require", "--resume is require, but --output-dir {dir}/run holds no job to go on with"),
    "actors 0": ("--actors 0", "--actors is 0; allowed is a whole number from 1"),
    "address form": ("--address nowhere", "--address is 'nowhere'; allowed is HOST:PORT"),
    "address client": ("--address ray://127.0.0.1:10001", "--address is 'ray://127.0.0.1:10001'; allowed is HOST:PORT"),
    "address dead": ("--address 127.0.0.1:9", "--address 127.0.0.1:9 cannot be reached"),
    "config missing": ("--config {dir}/no.yaml", "--config {dir}/no.yaml is no file"),
    "config unknown field": ("--config {dir}/job.yaml", "job.yaml has the field 'sparsety', which is not known"),
    "config no fields": ("--config {dir}/list.yaml", "list.yaml holds no fields"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(case, tiny):
    options, message = (text.replace("{dir}", str(tiny)) for text in CASES[case])
    given = {"--model": tiny / "model", "--dataset": tiny / "ids.npy", "--output-dir": tiny / "run"}
    defaults = [text for name, value in given.items() if not any(word == name for word in options.split()) for text in (name, str(value))]
    outcome = command("run", *defaults, *options.split())
    assert outcome.code == 2, outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert not ray.is_initialized()
    assert not (tiny / "run" / "manifest.json").exists()


def test_more_actors_than_cpus(tiny):
    outcome = command("run", "--model", tiny / "model", "--dataset", tiny / "ids.npy", "--output-dir", tiny / "run", "--actors", "999")
    assert outcome.code == 2 and "Error: --actors is 999, but Ray has" in outcome.err and "Traceback" not in outcome.err


def test_eval_none(tiny):
    outcome = command("eval", "--model", tiny / "model", "--eval-dataset", "none")
    assert outcome.code == 2 and "--eval-dataset is none, but eval does nothing else" in outcome.err


def test_status_of_no_job(tiny):
    outcome = command("status", tiny)
    assert outcome.code == 2 and "holds no job: it has no manifest.json" in outcome.err


def test_status_of_a_damaged_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    outcome = command("status", tmp_path)
    assert outcome.code == 2 and f"{tmp_path}/manifest.json is damaged" in outcome.err


def test_a_missing_model_option():
    outcome = command("run")
    assert outcome.code == 2 and "--model is missing; allowed is" in outcome.err
