"""Files that land whole or not at all."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MARK = ".tmp-"
PIECE = 1 << 24  # bytes that one thread hashes at a time


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving, it is flushed to disk and takes the place of `path`."""
    temporary = path.with_name(f"{path.name}{MARK}{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def remove_leftovers(directory: Path) -> None:
    """Temporary files of a killed process."""
    for leftover in directory.rglob(f"*{MARK}*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def piecewise_sha256(path: Path) -> str:
    """The SHA-256 of the SHA-256s of a file's pieces of 16 MiB, which several threads hash: large files are not kept waiting."""
    def of(start: int) -> bytes:
        with open(path, "rb") as opened:
            opened.seek(start)
            return hashlib.sha256(opened.read(PIECE)).digest()

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        return combined(threads.map(of, range(0, max(1, path.stat().st_size), PIECE)))


def combined(digests: Iterator[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()
