"""Hashes of files."""

import hashlib
import os

import pytest

from pipeline.files import PIECE, piecewise_sha256
from pipeline.storage import Storage


@pytest.mark.parametrize("size", [0, 5, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_a_hash_by_pieces_is_that_of_the_pieces_hashes(size, tmp_path):
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    pieces = [data[start:start + PIECE] for start in range(0, max(1, size), PIECE)]
    assert piecewise_sha256(tmp_path / "file") == hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()


def test_a_shard_has_the_same_hash_near_and_far(tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "layer_000.safetensors").write_bytes(os.urandom(2 * PIECE + 9))
    assert Storage(str(tmp_path)).digest(0) == Storage(f"file://{tmp_path}").digest(0)
