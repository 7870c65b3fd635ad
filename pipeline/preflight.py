"""Everything that can be found wrong before a model is loaded: from the configuration and the data alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline import sources
from pipeline.architectures import Architecture, architecture_of
from pipeline.config import Job, allowed
from pipeline.errors import UserError
from pipeline.model_config import is_expanded, read_config
from pipeline.texts import HUB_SETS
from pipeline.weights import Checkpoint
from pipeline.windows import Request

CONTEXT, LLAMA_CONTEXT = 2048, 4096  # the published window lengths
SELF_EVAL_WINDOWS, CALIBRATION_WINDOWS = 32, 128


@dataclass(frozen=True)
class Source:
    """A model on disk, dense or expanded; nothing of it is loaded but its configuration."""

    directory: Path
    name: str
    revision: str | None
    config: Any
    fingerprint: str

    @property
    def text_config(self):
        return self.config.text_config if self.is_expanded else self.config

    @property
    def is_expanded(self) -> bool:
        return is_expanded(self.config)

    @property
    def num_blocks(self) -> int:
        return self.text_config.num_hidden_layers

    @property
    def context(self) -> int:
        return self.text_config.max_position_embeddings

    @property
    def checkpoint_dtype(self) -> str | None:
        dtype = self.config.dtype or self.text_config.dtype
        return dtype and str(dtype).removeprefix("torch.")

    def tokenizer(self):
        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--model {self.name} has no tokenizer that can be read ({' '.join(str(error).split())[:150]}); "
                            "without one, give a .npy of token windows.") from None

    def described(self) -> str:
        return self.name if self.revision is None else f"{self.name} at {self.revision}"


def find_model(model: str, model_size: str | None, revision: str | None, cache_dir: str | None) -> Source:
    directory, revision = sources.fetch(model, model_size, revision, cache_dir)
    config = read_config(directory)
    fingerprint = Checkpoint(directory).fingerprint()
    name = sources.hub_id(model, model_size, revision)[0] if not Path(model).is_dir() else model
    return Source(directory, name, revision, config, fingerprint)


def check_shapes(job: Job, source: Source) -> Architecture:
    """What is to be expanded. Raises UserError where an option does not fit their widths."""
    if source.is_expanded:
        raise UserError(f"--model {source.name} is already expanded; give the dense model it came from.")
    architecture = architecture_of(source.config.model_type, source.name)
    checkpoint = Checkpoint(source.directory)
    for group in architecture.router_groups:
        for path in group:
            columns = checkpoint.shape(f"{architecture.blocks}.0.{path}.weight")[1]
            if job.components(columns) == 0:
                raise UserError(f"--pca-reduction-factor is {job.pca_reduction_factor}, but {path} has {columns} in features; "
                                f"allowed is {allowed('pca_reduction_factor')}.")
            if job.pattern.is_n_of_m and columns % job.pattern.m:
                raise UserError(f"--sparsity is {job.pattern}, but {path} has {columns} in features, which {job.pattern.m} does not divide.")
            if job.quantize and job.group_size and job.group_size > columns:
                raise UserError(f"--group-size is {job.group_size}, but {path} has {columns} in features; allowed is 1 to {columns}.")
    return architecture


def router_shapes(source: Source, architecture: Architecture) -> tuple[tuple[int, int], ...]:
    """For each router the rows of its linears together, and their columns."""
    checkpoint = Checkpoint(source.directory)
    shapes = [[checkpoint.shape(f"{architecture.blocks}.0.{path}.weight") for path in group] for group in architecture.router_groups]
    return tuple((sum(rows for rows, _ in group), group[0][1]) for group in shapes)


def window_length(job_length: int | None, source: Source, dataset: str) -> int | None:
    """Tokens of a window. Raises UserError if they exceed the model's context. None: as the .npy file has it."""
    if job_length is not None and job_length > source.context:
        raise UserError(f"--seq-len is {job_length}, but the context of --model {source.name} is {source.context} tokens; allowed is 2 to {source.context}.")
    if job_length is not None or dataset.endswith(".npy"):
        return job_length
    return min(source.context, LLAMA_CONTEXT if source.text_config.model_type == "llama" else CONTEXT)


def calibration_request(job: Job, source: Source) -> Request:
    length = window_length(job.seq_len, source, job.dataset)
    count = job.dataset_size or (None if job.dataset.endswith(".npy") else CALIBRATION_WINDOWS)
    held_out = job.eval_dataset is None and _has_no_splits(job.dataset)
    return Request(job.dataset, False, length, count, job.seed, job.cache_dir, held_out)


def evaluation_request(job: Job, source: Source, calibration_length: int | None) -> Request | None:
    """None if nothing is to be evaluated. Windows are as long as the calibration windows unless a .npy says otherwise."""
    if job.eval_dataset == "none":
        return None
    name = job.eval_dataset or job.dataset
    length = window_length(job.seq_len, source, name)
    if length is not None and job.seq_len is None and calibration_length is not None:
        length = calibration_length
    count = job.eval_size or (SELF_EVAL_WINDOWS if name == "self" else None)
    held_out = job.eval_dataset is None and _has_no_splits(name)
    return Request(name, True, length, count, job.seed + 1, job.cache_dir, held_out)


def check_windows(length: int, source: Source, option: str) -> None:
    if length > source.context:
        raise UserError(f"{option} has windows of {length} tokens, but the context of --model {source.name} is {source.context}; allowed is 2 to {source.context}.")


def check_clusters(job: Job, tokens: int) -> None:
    if job.num_clusters > tokens:
        raise UserError(f"--num-clusters is {job.num_clusters}, but the calibration windows hold {tokens} tokens; allowed is 1 to {tokens}.")


def _has_no_splits(name: str) -> bool:
    return name not in (*HUB_SETS, "self") and not (Path(name) / "dataset_dict.json").is_file()
