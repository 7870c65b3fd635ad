"""Files that land whole or not at all."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = ".tmp-"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving, it is flushed to disk and takes the place of `path`."""
    temporary = path.with_name(f"{path.name}{MARK}{os.getpid()}")
    try:
        yield temporary
        flushed(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flushed(path.parent)


def flushed(path: Path) -> None:
    """A file, or a folder's entries, on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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
