"""Shards that several fill in place: the safetensors library reads them; whoever writes what, the bytes and the hash are the same."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.layout import PIECE, TYPES, Layout, described, digest_of
from pipeline.storage import Storage


def some_tensors(seed: int, count: int = 6) -> dict[str, torch.Tensor]:
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    tensors = {}
    for number in range(count):
        shape = [choose.randrange(0, 6) for _ in range(choose.randrange(0, 4))]
        tensors[f"{choose.choice('abc')}.{number}.weight"] = (100 * torch.randn(shape, generator=generator)).to(choose.choice(list(TYPES)))
    return tensors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_file_filled_by_several_is_read_by_the_library(tmp_path_factory, seed, writers):
    folder, tensors = tmp_path_factory.mktemp("shard"), some_tensors(seed)
    layout, file = Layout(described(tensors), {"format": "x"}), folder / "file"
    layout.create(file)
    names, hashes = random.Random(seed).sample(list(tensors), len(tensors)), {}
    for writer in range(writers):
        hashes |= layout.fill(file, {name: tensors[name] for name in names[writer::writers]})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "x"}
    assert layout.digest(hashes) == digest_of(file)

    Storage(str(folder)).write(0, tensors)
    again = Layout(described(tensors), {"format": "3"})
    assert Path(Storage(str(folder)).path(0)).stat().st_size == again.size


def test_the_hash_is_that_of_the_hashes_of_header_and_tensors(tmp_path):
    tensors = {"b": torch.randn(PIECE // 4 + 3), "a": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 3)}
    storage = Storage(str(tmp_path))
    digest = storage.write(0, tensors)
    data = Path(storage.path(0)).read_bytes()
    header = data[:8 + int.from_bytes(data[:8], "little")]
    parts = [header, tensors["b"].numpy().tobytes(), b"", bytes(range(5))]
    assert data == b"".join(parts)
    assert digest == hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest() == storage.digest(0)
    assert Storage(f"file://{tmp_path}").digest(0) == digest


@pytest.mark.parametrize("place", ["length", "header", "tensor", "cut", "longer"])
def test_damage_changes_the_hash(place, tmp_path):
    storage = Storage(str(tmp_path))
    digest = storage.write(0, {"a": torch.randn(40, 40), "b": torch.randn(3)})
    file = Path(storage.path(0))
    data = bytearray(file.read_bytes())
    if place == "cut":
        data = data[:-1]
    elif place == "longer":
        data += b"\0"
    else:
        data[{"length": 6, "header": 40, "tensor": len(data) - 9}[place]] ^= 1
    file.write_bytes(data)
    for damaged in (storage, Storage(f"file://{tmp_path}")):
        found = damaged.digest(0)
        assert found is not None and found != digest
    file.unlink()
    assert storage.digest(0) is None
