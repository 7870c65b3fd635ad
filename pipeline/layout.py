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
    with open(path, "rb") as opened:
        ranges = _ranges_in(opened, path.stat().st_size)
    if ranges is None:
        return None
    with ThreadPoolExecutor(_threads()) as threads:
        return _combined(threads.map(lambda span: _hash_of(path, *span), ranges))


def digest_of_stream(opened, size: int) -> str | None:
    """As `digest_of`, of an open binary file that is read once, from front to back."""
    head = opened.read(8)
    text = opened.read(min(int.from_bytes(head, "little"), size))
    spans = _spans(head, text, size)
    if spans is None:
        return None
    hashes = [hashlib.sha256(head + text).digest()]
    for start, stop in spans[1:]:
        found = hashlib.sha256()
        while start < stop:
            piece = opened.read(min(PIECE, stop - start))
            if not piece:
                return None
            found.update(piece)
            start += len(piece)
        hashes.append(found.digest())
    return _combined(hashes)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError says of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _ranges_in(opened, size: int) -> list[tuple[int, int]] | None:
    head = opened.read(8)
    return _spans(head, opened.read(min(int.from_bytes(head, "little"), size)), size)


def _spans(head: bytes, text: bytes, size: int) -> list[tuple[int, int]] | None:
    """First and last byte of the header and of each tensor; None unless they fill the file."""
    start = 8 + len(text)
    try:
        told = json.loads(text)
        told.pop("__metadata__", None)
        spans = [(0, start)] + sorted((start + first, start + last) for first, last in (entry["data_offsets"] for entry in told.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = len(head) == 8 and all(before[1] == after[0] for before, after in zip(spans, spans[1:])) and spans[-1][1] == size
    return spans if whole else None


def _hash_of(path: Path, start: int, stop: int) -> bytes:
    found = hashlib.sha256()
    with open(path, "rb") as opened:
        opened.seek(start)
        while start < stop and (piece := opened.read(min(PIECE, stop - start))):
            found.update(piece)
            start += len(piece)
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
