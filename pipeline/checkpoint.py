"""The run directory: one shard a layer, the manifest, resume. Files on disk are the truth.

    config.yaml        the resolved job
    manifest.json      format, identity of the job, shards with their hashes and reports, evaluations, seconds
    windows/           the token windows, so that a resumed job sees the same ones
    layers/            layer_000.safetensors ... (unless --storage keeps them elsewhere)
    stats/             experts.parquet
    progress.json      where a running job is, for status
    profile/           where the time went, if that was asked for
    model/             the assembled model
"""

import fcntl
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import MARK, remove_leftovers, sha256, write_json
from pipeline.storage import FOLDER, FORMAT, Storage

PROGRESS = "progress.json"
OWN_FILES = {".lock", "windows", "config.yaml", PROGRESS}  # what a job may have written before its manifest


class RunDirectory:
    """One job's directory, locked against a second driver while it is open.

    storage: where its shards lie (the directory itself unless given). token: is in the file `mark` while it is open, so that
    another machine can tell whether it sees this very directory.
    """

    def __init__(self, path: Path, storage: Storage | None = None):
        self.path, self.storage = path, storage or Storage(str(path))
        self.token = secrets.token_hex(8)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "a+")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"--output-dir {path} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"--output-dir {path} is in use by another process; wait for it or give another directory.") from None
        if self.storage.is_remote:
            self.mark = None
        else:
            self.mark = Path(self.storage.root) / ".lock"
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.write_text(self.token)
        self.manifest: dict[str, Any] = {}

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def model(self) -> Path:
        return self.path / "model"

    def open_job(self, identity: dict[str, Any], num_blocks: int, resume: str) -> list[str]:
        """Bind the directory to a job. Returns warnings (damaged shards, which are forgotten and will be made again).

        Raises UserError as `check_directory` does.
        """
        check_directory(self.path, identity, resume)
        stored = read_manifest(self.path)
        remove_leftovers(self.path)
        self.storage.remove_leftovers()
        if stored is None or resume == "never":
            for made in (FOLDER, "model", "stats"):
                shutil.rmtree(self.path / made, ignore_errors=True)
            stored = {"format": FORMAT, "identity": identity, "num_blocks": num_blocks, "layers": {}, "evaluations": {}, "seconds": {}}
        self.manifest = stored
        self.num_blocks = num_blocks
        warnings = self._forget_damaged()
        self.save()
        return warnings

    def _forget_damaged(self) -> list[str]:
        warnings = []
        for index, entry in sorted(self.manifest["layers"].items(), key=lambda item: int(item[0])):
            found = self.storage.digest(int(index))
            if found != entry["hash"]:
                warnings.append(f"{self.storage.path(int(index))} is {'missing' if found is None else 'damaged'}; layer {index} is made again.")
                del self.manifest["layers"][index]
        for name, digest in self.manifest.get("model", {}).items():
            path = self.model / name
            if not path.is_file() or sha256(path) != digest:
                warnings.append(f"{path} is {'damaged' if path.is_file() else 'missing'}; the model is assembled again.")
                del self.manifest["model"]
                break
        return warnings

    def save(self) -> None:
        write_json(self.path / "manifest.json", self.manifest)

    def missing_layers(self) -> list[int]:
        return [index for index in range(self.num_blocks) if str(index) not in self.manifest["layers"]]

    def record_layer(self, index: int, digest: str, seconds: dict[str, float], reports: list[dict]) -> None:
        self.manifest["layers"][str(index)] = {"hash": digest, "seconds": seconds, "experts": reports}
        self.manifest.pop("model", None)
        self.save()

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.manifest["seconds"][stage] = self.manifest["seconds"].get(stage, 0.0) + seconds


def windows_file(path: Path, kind: str) -> Path:
    """Calibration or evaluation windows in a run directory."""
    return path / "windows" / f"{kind}.safetensors"


def is_running(path: Path) -> bool:
    """Does a driver have this directory open?"""
    try:
        with open(path / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a running job wrote last: stage, share done, seconds left, when (seconds since the epoch)."""
    try:
        return json.loads((path / PROGRESS).read_text())
    except (OSError, ValueError):
        return None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """None if there is none. Raises UserError if it is damaged or of another format."""
    file = path / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        written, _ = manifest["format"], (manifest["identity"], manifest["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error!r}; move it away to start over (the layers beside it are not read without it).") from None
    if written != FORMAT:
        raise UserError(f"{file} has format {written}; this version reads format {FORMAT}.")
    return manifest


def check_directory(path: Path, identity: dict[str, Any], resume: str) -> None:
    """Before anything is loaded: can this job use the run directory? `identity` may lack fields that are not known yet.

    Raises UserError if it cannot be written, holds another job (naming the fields that differ) or files that are no job's,
    or if `resume` is "require" and there is nothing to go on with.
    """
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {path} cannot be written: {folder} is {'not writable' if folder.is_dir() else 'no directory'}.")
    stored = read_manifest(path)
    if stored is None:
        if resume == "require":
            raise UserError(f"--resume is require, but --output-dir {path} holds no job to go on with; allowed there is auto or never.")
        strangers = sorted(file.name for file in path.iterdir() if file.name not in OWN_FILES and MARK not in file.name) if path.is_dir() else []
        if strangers:
            raise UserError(f"--output-dir {path} holds files that are no job's ({strangers[0]}); give a new or an empty directory.")
        return
    there = stored["identity"]
    differing = [f"{name} ({there.get(name, 'absent')} there, {value} here)" for name, value in identity.items() if there.get(name) != value]
    if differing:
        raise UserError(f"--output-dir {path} holds another job: it differs in {', '.join(differing)}; give another directory.")
