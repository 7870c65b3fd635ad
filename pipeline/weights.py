"""A checkpoint's tensors by name, straight from safetensors, one at a time; and safetensors written."""

import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.architectures import RENAMED
from pipeline.errors import UserError


class Checkpoint:
    """The safetensors files of a model directory, one file or several with an index."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} is damaged: {error}.") from None
            self._file_of = {name: self.directory / file for name, file in weight_map.items()}
            missing = sorted({str(file) for file in self._file_of.values() if not file.is_file()})
            if missing:
                raise UserError(f"{index} names {missing[0]}, which is missing.")
            for file in self.files:
                self._names(file)
        else:
            file = self.directory / "model.safetensors"
            if not file.is_file():
                raise UserError(f"--model {directory} holds no safetensors (model.safetensors or model.safetensors.index.json); "
                                "save it with save_pretrained of transformers, which writes them.")
            self._file_of = {name: file for name in self._names(file)}

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def _names(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}.") from None

    def find(self, name: str) -> str | None:
        """The stored name of a parameter, also where other versions call it something else; None if it is not there."""
        candidates = [name] + [name.replace(new, old, 1) for new, old in RENAMED.items() if name.startswith(new)]
        candidates += [candidate.partition(".")[2] for candidate in candidates]  # saved from the base model, without its prefix
        return next((candidate for candidate in candidates if candidate in self._file_of), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, from the file's header."""
        stored = self.find(name)
        if stored is None:
            raise UserError(f"{self.directory} lacks the tensor {name}.")
        with safe_open(self._file_of[stored], framework="pt") as opened:
            return tuple(opened.get_slice(stored).get_shape())

    def load(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors on the CPU as stored. `names` maps the names wanted in the result to stored names."""
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._file_of[stored] for stored in names.values()}):
            try:
                with safe_open(file, framework="pt") as opened:
                    tensors |= {name: opened.get_tensor(stored) for name, stored in names.items() if self._file_of[stored] == file}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged: {error}.") from None
        return tensors

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and, of every file, its size and header: cheap, and another model differs."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in self.files:
            with open(file, "rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
                digest.update(file.stat().st_size.to_bytes(8, "little") + opened.read(header))
                # The first and the last mebibyte of the data: a retrained model has the same header.
                digest.update(opened.read(1 << 20))
                opened.seek(max(-(1 << 20), -file.stat().st_size), 2)
                digest.update(opened.read())
        return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """As safetensors, but a full disk is an OSError."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


class CheckpointWriter:
    """A model directory's safetensors, file by file, and their index. files: how many there will be. total: bytes of the tensors so far."""

    def __init__(self, directory: Path, files: int):
        self.total = 0
        self._directory, self._files = directory, files
        self._file_of: dict[str, str] = {}
        self._number = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        """The next file."""
        self._number += 1
        name = f"model-{self._number:05d}-of-{self._files:05d}.safetensors"
        save_tensors(tensors, self._directory / name, {"format": "pt"})
        self._file_of.update(dict.fromkeys(tensors, name))
        self.total += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.total}, "weight_map": self._file_of}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
