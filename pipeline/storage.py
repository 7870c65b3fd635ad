"""Where layer shards lie: a directory, or a place that fsspec knows (s3://bucket/run, sftp://...)."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import MARK, flushed, remove_leftovers
from pipeline.layout import Entry, Layout, described, digest_of, digest_of_stream

FORMAT = 3  # 1 and 2 kept all experts of a linear in one tensor, and hashed whole files
FOLDER = "layers"


@dataclass(frozen=True)
class Storage:
    """`root`: a directory, or a URL with a scheme. Keys to a remote place come from the environment, never from the URL."""

    root: str

    @property
    def is_remote(self) -> bool:
        return "://" in self.root

    def path(self, index: int) -> str:
        return f"{self.root.rstrip('/')}/{FOLDER}/layer_{index:03d}.safetensors"

    def layout(self, entries: dict[str, Entry]) -> Layout:
        return Layout(entries, {"format": str(FORMAT)})

    # A file that several fill: made by one, filled by all, and whole or not there at all

    def create(self, index: int, layout: Layout) -> Path:
        """A file for `Layout.fill`, beside the place that `finish` will give it."""
        path = Path(self.path(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}{MARK}{os.getpid()}")
        layout.create(temporary)
        return temporary

    def finish(self, index: int, temporary: Path) -> None:
        """Every tensor is there."""
        flushed(temporary)
        os.replace(temporary, self.path(index))
        flushed(temporary.parent)

    def write(self, index: int, tensors: dict[str, Tensor]) -> str:
        """Write a layer's tensors, whole or not at all; returns the file's hash. The same tensors give the same bytes."""
        layout = self.layout(described(tensors))
        if self.is_remote:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "shard"
                layout.create(file)
                digest = layout.digest(layout.fill(file, tensors))
                filesystem, path = self._remote(index)
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(file), path)
                return digest
        temporary = self.create(index, layout)
        try:
            digest = layout.digest(layout.fill(temporary, tensors))
            self.finish(index, temporary)
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    def read(self, index: int) -> dict[str, Tensor]:
        """All tensors, on the CPU."""
        if not self.is_remote:
            return load_file(self.path(index))
        with tempfile.TemporaryDirectory() as folder:
            filesystem, path = self._remote(index)
            filesystem.get_file(path, f"{folder}/shard")
            return load_file(f"{folder}/shard")

    def digest(self, index: int) -> str | None:
        """Hash of a layer's file, empty if it is damaged beyond that; None if it is not there."""
        if not self.is_remote:
            path = Path(self.path(index))
            return digest_of(path) or "" if path.is_file() else None
        filesystem, path = self._remote(index)
        if not filesystem.exists(path):
            return None
        with filesystem.open(path, "rb") as opened:
            return digest_of_stream(opened, filesystem.size(path)) or ""

    def remove_leftovers(self) -> None:
        """Files that nobody finished. (A remote place shows whole files only.)"""
        if not self.is_remote:
            remove_leftovers(Path(self.root) / FOLDER)

    def check(self) -> None:
        """Raises UserError if nothing can be written there."""
        try:
            if self.is_remote:
                filesystem, path = self._remote(0)
                folder = path.rpartition("/")[0]
                filesystem.makedirs(folder, exist_ok=True)
                with filesystem.open(f"{folder}/.check", "wb") as opened:
                    opened.write(b"here")
                filesystem.rm(f"{folder}/.check")
            else:
                (Path(self.root) / FOLDER).mkdir(parents=True, exist_ok=True)
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"--storage {self.root} cannot be written: {' '.join(str(error).split())[:200]}; allowed is a directory that "
                            "every node sees, or a URL that fsspec knows, such as s3://bucket/run.") from None

    def _remote(self, index: int) -> tuple[Any, str]:
        import fsspec  # only where it is asked for: it takes a while

        return fsspec.core.url_to_fs(self.path(index))
