"""Token windows: every kind of data, cut as published, and refused with a sentence where it cannot be."""

import gzip
import json
import random

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer

from pipeline.demo import DEMO_MODEL
from pipeline.errors import UserError
from pipeline.windows import Request, Windows, read_windows

TEXT = "It was a bright cold day and the ship lay at anchor. " * 60


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def read(name, tokenizer, *, test=False, length=16, count=5, seed=0, held_out=False) -> Windows:
    return read_windows(Request(str(name), test, length, count, seed, None, held_out), lambda: tokenizer, 2048)


def write(path, documents: list[str]) -> None:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    if path.name.endswith(".txt"):
        path.write_text("\n\n".join(documents))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"text": documents}), path)
    elif path.suffix == "":
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(path)
    else:
        path.write_text(lines)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.parquet", "saved"])
def test_every_format_gives_the_same_windows(name, tmp_path, tokenizer):
    documents = [TEXT, "Second. " * 50]
    write(tmp_path / name, documents)
    stream = tokenizer("\n\n".join(documents))["input_ids"]
    consecutive = read(tmp_path / name, tokenizer, test=True, count=None)
    assert consecutive.ids_WL.flatten().tolist() == stream[:len(stream) // 16 * 16]
    generator = random.Random(3)
    starts = [generator.randint(0, len(stream) - 17) for _ in range(5)]
    assert read(tmp_path / name, tokenizer, seed=3).ids_WL.tolist() == [stream[start:start + 16] for start in starts]


def test_seed_decides(tmp_path, tokenizer):
    write(tmp_path / "a.txt", [TEXT])
    first, again, other = (read(tmp_path / "a.txt", tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids_WL, again.ids_WL) and not torch.equal(first.ids_WL, other.ids_WL)


def test_held_out_parts_do_not_overlap(tmp_path, tokenizer):
    """One file for both: evaluation gets its last tenth, calibration the rest."""
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(40 * 8).reshape(40, 8))
    train, test = (read(path, tokenizer, test=test, length=None, count=None, held_out=True) for test in (False, True))
    assert (train.count, test.count) == (36, 4)
    assert not set(train.ids_WL.flatten().tolist()) & set(test.ids_WL.flatten().tolist())
    write(tmp_path / "a.txt", [TEXT])
    stream = tokenizer(TEXT)["input_ids"]
    held_out = read(tmp_path / "a.txt", tokenizer, test=True, count=None, held_out=True).ids_WL.flatten().tolist()
    start = int(len(stream) * 0.9)
    assert held_out == stream[start:start + len(held_out)]


def fake_hub(monkeypatch, **splits: list[str]) -> list[dict]:
    """What `datasets` would return for a hub data set, and the calls that asked for it."""
    calls = []

    def load_dataset(**request):
        calls.append(request)
        column = "sentence" if "ptb" in request["path"] else "text"
        return datasets.Dataset.from_dict({column: splits[request["split"]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_wikitext2_is_joined_as_published(monkeypatch, tokenizer):
    calls = fake_hub(monkeypatch, train=["", " = Title = \n", TEXT], test=["", " = Test = \n", TEXT])
    train = tokenizer(" ".join(["", " = Title = \n", TEXT]))["input_ids"]
    start = random.Random(0).randint(0, len(train) - 17)
    assert read("wikitext2", tokenizer).ids_WL[0].tolist() == train[start:start + 16]
    test = tokenizer("\n\n".join(["", " = Test = \n", TEXT]))["input_ids"]
    assert read("wikitext2", tokenizer, test=True, count=1).ids_WL[0].tolist() == test[:16]
    assert calls[0]["path"] == "Salesforce/wikitext" and calls[0]["name"] == "wikitext-2-raw-v1"


def test_c4_takes_long_documents_and_256_windows(monkeypatch, tokenizer):
    fake_hub(monkeypatch, train=["short"] * 20 + [TEXT], validation=[TEXT] * 40)
    windows = read("c4", tokenizer, length=64)
    stream = tokenizer(TEXT)["input_ids"]
    inside = {tuple(stream[start:start + 64]) for start in range(len(stream) - 63)}
    assert all(tuple(window) in inside for window in windows.ids_WL.tolist())
    assert read("c4", tokenizer, test=True, count=None).count == 256


def test_ptb_reads_sentences(monkeypatch, tokenizer):
    fake_hub(monkeypatch, train=[TEXT], test=[TEXT, TEXT])
    assert read("ptb", tokenizer, test=True, count=1).ids_WL[0].tolist() == tokenizer(TEXT)["input_ids"][:16]


def test_offline_hub_set_is_a_sentence(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--dataset wikitext2 could not be loaded .* give a local file"):
        read_windows(Request("wikitext2", False, 16, 5, 0, str(tmp_path)), lambda: tokenizer, 2048)


def test_too_little_text_says_how_many_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("A few words.")
    with pytest.raises(UserError, match=r"--dataset .*a\.txt holds \d tokens, but 81 are needed for 5 windows of 16"):
        read(tmp_path / "a.txt", tokenizer)


@pytest.mark.parametrize("array, message", [
    (np.zeros((4, 8), np.float32), "holds float32"), (np.zeros(8, np.int64), "of shape"), (np.full((4, 8), 2048), "the token id 2048"),
    (np.full((4, 8), -1), "the token id -1"), (np.zeros((4, 8), np.int64), "--dataset-size is 5"),
])
def test_bad_arrays(array, message, tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.npy", tokenizer, length=None)


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", b"not an array", "is damaged"), ("a.txt", b"", "is empty"), ("a.txt", b"\xff\xfe\xfa", "not UTF-8"), ("a.pdf", b"x", "ending that is not known"),
    ("a.jsonl", b"{broken", "is damaged"), ("a.parquet", b"broken", "is damaged"), ("a.jsonl", b'{"words": "x"}\n', "columns words"),
])
def test_bad_files(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, tokenizer, length=None if name.endswith("npy") else 16)


def test_save_and_load(tmp_path):
    windows = Windows(torch.arange(12).view(3, 4), "a source")
    windows.save(tmp_path / "w.safetensors")
    loaded = Windows.load(tmp_path / "w.safetensors")
    assert torch.equal(loaded.ids_WL, windows.ids_WL) and loaded.source == "a source" and loaded.digest() == windows.digest()
    (tmp_path / "w.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="w.safetensors is damaged"):
        Windows.load(tmp_path / "w.safetensors")
