"""Where layer shards lie: a directory, or a place that fsspec knows (s3://bucket/run, sftp://...)."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import PIECE, combined, piecewise_sha256, replacing
from pipeline.weights import save_tensors

FORMAT = 2  # 1 named layers by one SHA-256 of the whole file
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

    def write(self, index: int, tensors: dict[str, Tensor]) -> str:
        """Write a layer's tensors, whole or not at all; returns the file's hash (`piecewise_sha256`). The same tensors give the same bytes."""
        tensors = {name: tensors[name].cpu() for name in sorted(tensors)}
        metadata = {"format": str(FORMAT)}
        if self.is_remote:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "shard"
                save_tensors(tensors, file, metadata)
                filesystem, path = self._remote(index)
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(file), path)
                return piecewise_sha256(file)
        path = Path(self.path(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_tensors(tensors, temporary, metadata)
            return piecewise_sha256(temporary)

    def read(self, index: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tensors that go into the model, and the labels of each router."""
        if self.is_remote:
            with tempfile.TemporaryDirectory() as folder:
                filesystem, path = self._remote(index)
                filesystem.get_file(path, f"{folder}/shard")
                tensors = load_file(f"{folder}/shard")
        else:
            tensors = load_file(self.path(index))
        labels = [tensors.pop(name) for name in sorted(name for name in tensors if name.startswith("labels."))]
        return tensors, labels

    def digest(self, index: int) -> str | None:
        """Hash of a layer's file; None if it is not there."""
        if not self.is_remote:
            path = Path(self.path(index))
            return piecewise_sha256(path) if path.is_file() else None
        filesystem, path = self._remote(index)
        if not filesystem.exists(path):
            return None
        with filesystem.open(path, "rb") as opened:
            pieces = iter(lambda: opened.read(PIECE), b"")
            return combined(hashlib.sha256(piece).digest() for piece in pieces)

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
