"""A safetensors file whose layout is known before its contents: several processes each write their own tensors into it, in place.

The bytes follow from names, dtypes, shapes and values alone, whoever writes what and when. The file's hash is the SHA-256 of the
SHA-256s of its header and its tensors, in their order in the file: whoever writes a tensor hashes it, and nobody reads it again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes that are copied, hashed and written at a time
WRITERS = 8  # threads, at most
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
         torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Entry:
    """A tensor, but for its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def described(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


class Layout:
    """Where the tensors lie. header: the file's first bytes. ranges: first byte and the one after the last of every tensor, in
    their order in the file (wide types first, so that all are aligned). size: of the file."""

    def __init__(self, entries: dict[str, Entry], metadata: dict[str, str]):
        names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
        told, at = {"__metadata__": metadata}, 0
        for name in names:
            entry = entries[name]
            told[name] = {"dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
            at += entry.nbytes
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.ranges = {name: tuple(len(self.header) + place for place in told[name]["data_offsets"]) for name in names}
        self.size = len(self.header) + at

    def create(self, path: Path) -> None:
        """A new file of full size that holds its header."""
        path.unlink(missing_ok=True)
        with _named(path), open(path, "wb") as opened:
            opened.write(self.header)
            opened.truncate(self.size)

    def fill(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, bytes]:
        """Write these tensors into the file that `create` made, and flush them to disk. Returns their SHA-256s. Raises OSError, naming the file."""
        with _named(path), open(path, "r+b", buffering=0) as opened, ThreadPoolExecutor(_threads()) as threads:
            hashes = list(threads.map(lambda name: _write(opened.fileno(), self.ranges[name][0], tensors[name]), tensors))
            os.fsync(opened)
        return dict(zip(tensors, hashes))

    def digest(self, hashes: dict[str, bytes]) -> str:
        """The file's hash. hashes: of every tensor."""
        return _combined([hashlib.sha256(self.header).digest(), *(hashes[name] for name in self.ranges)])


def digest_of(path: Path) -> str | None:
    """The hash of a file that is there; None if it is no safetensors file."""
    def of(span: tuple[int, int]) -> bytes:
        with open(path, "rb") as opened:
            opened.seek(span[0])
            return _hash_of(opened, span[1] - span[0])

    with open(path, "rb") as opened:
        head, spans = _read_header(opened, path.stat().st_size)
    if spans is None:
        return None
    with ThreadPoolExecutor(_threads()) as threads:
        return _combined([hashlib.sha256(head).digest(), *threads.map(of, spans)])


def digest_of_stream(opened, size: int) -> str | None:
    """As `digest_of`, of an open binary file that is read once, from front to back."""
    head, spans = _read_header(opened, size)
    if spans is None:
        return None
    return _combined([hashlib.sha256(head).digest(), *(_hash_of(opened, stop - start) for start, stop in spans)])


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError says of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read_header(opened, size: int) -> tuple[bytes, list[tuple[int, int]] | None]:
    """The header, and the first byte and the one after the last of every tensor, in order; None unless they fill a file of this size."""
    head = opened.read(8)
    head += opened.read(min(int.from_bytes(head, "little"), size))
    try:
        told = json.loads(head[8:])
        told.pop("__metadata__", None)
        spans = sorted((len(head) + first, len(head) + last) for first, last in (entry["data_offsets"] for entry in told.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return head, None
    ends = [len(head), *(stop for _, stop in spans)]
    return head, spans if [start for start, _ in spans] == ends[:-1] and ends[-1] == size else None


def _hash_of(opened, count: int) -> bytes:
    """Of the next bytes of a file."""
    found = hashlib.sha256()
    while count and (piece := opened.read(min(PIECE, count))):
        found.update(piece)
        count -= len(piece)
    return found.digest()


def _write(opened: int, at: int, tensor: Tensor) -> bytes:
    found = hashlib.sha256()
    for piece in _pieces(tensor):
        found.update(piece)
        while piece:
            written = os.pwrite(opened, piece, at)
            piece, at = piece[written:], at + written
    return found.digest()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes. From a GPU they come through a small pinned buffer, beside what is computed there."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.is_cuda:
        pinned, stream = torch.empty(min(PIECE, len(flat)), dtype=torch.uint8, pin_memory=True), torch.cuda.Stream(flat.device)
    for start in range(0, len(flat), PIECE):
        part = flat[start:start + PIECE]
        if part.is_cuda:
            with torch.cuda.stream(stream):
                part = pinned[:len(part)].copy_(part, non_blocking=True)
            stream.synchronize()
        yield memoryview(part.numpy())


def _combined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _threads() -> int:
    return min(WRITERS, len(os.sched_getaffinity(0)))
