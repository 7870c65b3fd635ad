"""The job: every option, its bounds and its one line of doc. YAML in and out.

Each field's `allowed` completes the sentence "--option is VALUE; allowed is ...".
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import UserError
from pipeline.pattern import ALLOWED as ALLOWED_SPARSITY
from pipeline.pattern import Pattern
from pipeline.texts import KNOWN as KNOWN_DATA

ROUNDING = ("bits", "group_size", "symmetric", "mse")  # mean nothing without --quantize


def _field(default: Any, doc: str, allowed: str, **bounds) -> Any:
    return Field(default, description=doc, json_schema_extra={"allowed": allowed}, **bounds)


class Job(BaseModel):
    """One run. Frozen; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = _field(..., "Hub id, local directory, demo, or pythia / llama with --model-size.", "a hub id, a local directory, demo, pythia or llama", min_length=1)
    model_size: str | None = _field(None, "With --model pythia: 14m to 12b. With --model llama: 2-7b, 2-13b, 3-8b, tinyllama-1.1b.", "a size such as 1.4b")
    revision: str | None = _field(None, "Branch, tag or commit on the hub (Pythia: step143000 unless given).", "a branch, tag or commit", min_length=1)
    cache_dir: str | None = _field(None, "Where models and data sets from the hub are kept.", "a directory", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field("auto", "Of weights and activations; auto is the checkpoint's own on a GPU and float32 on a CPU.", "auto, float32, bfloat16 or float16")

    sparsity: str = _field("0.5", "Share of weights pruned (0.5), or N:M with N kept of every M (2:4).", ALLOWED_SPARSITY)
    quantize: bool = _field(False, "Round the kept weights to integers in the same pass (GPTQ).", "true or false")
    bits: int = _field(4, "Bits of a quantized weight.", "a whole number from 2 to 8, with --quantize", ge=2, le=8)
    group_size: int | None = _field(None, "Columns that share a scale; unless given, a whole row does.", "a whole number from 1, with --quantize", ge=1)
    symmetric: bool = _field(False, "Centre the integer range on 0.", "true or false, with --quantize")
    mse: bool = _field(False, "Shrink each integer range to the one of least error.", "true or false, with --quantize")

    num_clusters: int = _field(16, "Experts of each linear; 1 is plain SparseGPT.", "a whole number from 1", ge=1)
    pca_reduction_factor: int = _field(8, "Cluster in (in features / this) principal components.", "a whole number from 1 to the narrowest expanded linear's in features, without --no-pca", ge=1)
    no_pca: bool = _field(False, "Cluster the raw inputs.", "true or false")
    kmeans_restarts: int = _field(10, "A router is as good as the best of so many KMeans runs; where tokens abound most of them run on a sample.", "a whole number from 1", ge=1)

    propagation: Literal["sparse", "dense"] = _field("sparse", "What a block is fitted on: what the experts before it give (sparse, as published), or what the dense model gives (dense: blocks need not wait for each other).", "sparse or dense")

    dataset: str = _field("wikitext2", f"Calibration data: {KNOWN_DATA}.", KNOWN_DATA, min_length=1)
    dataset_size: int | None = _field(None, "Calibration windows; 128 unless given (of a .npy file, all).", "a whole number from 1", ge=1)
    seq_len: int | None = _field(None, "Tokens of a window; the model's context unless given, 2048 at most (Llama: 4096).", "a whole number from 2", ge=2)
    eval_dataset: str | None = _field(None, "Evaluation data, or none; unless given, the same data's test split (of a local file, a tenth held out).", f"{KNOWN_DATA}, or none", min_length=1)
    eval_size: int | None = _field(None, "Evaluation windows; all there are unless given (c4: 256; self: 32).", "a whole number from 1", ge=1)
    no_dense: bool = _field(False, "Do not evaluate the dense model beside the expanded one.", "true or false")
    seed: int = _field(0, "Of calibration windows, KMeans starts and sampling.", "a whole number from 0 to 4294901759", ge=0, le=2**32 - 2**16 - 1)

    output_dir: str | None = _field(None, "Run directory; runs/MODEL-SPARSITY-kCLUSTERS unless given.", "a directory", min_length=1)
    resume: Literal["auto", "require", "never"] = _field("auto", "auto: go on with what the directory holds; require: fail if it holds nothing; never: start over.", "auto, require or never")

    actors: int | None = _field(None, "Ray actors; one for each GPU unless given, without GPUs one for each node.", "a whole number from 1", ge=1)
    gpus_per_actor: float | None = _field(None, "Share of a GPU that an actor takes: with 0.5, two share one.", "a fraction above 0, up to 1", gt=0, le=1)
    threads: int | None = _field(None, "CPU threads of each actor; the CPUs are shared out unless given (or OMP_NUM_THREADS is set).", "a whole number from 1", ge=1)
    address: str | None = _field(None, "Ray cluster to run on (HOST:PORT, or auto for the one on this machine); unless given, Ray starts here.", "HOST:PORT or auto", min_length=1)
    storage: str | None = _field(None, "Where layer shards are kept: a directory that every node sees, or an fsspec URL such as s3://bucket/run; the run directory unless given, and what a node does not see travels through the driver.", "a directory or a URL that fsspec knows", min_length=1)
    activations: Literal["auto", "device", "host", "disk"] = _field("auto", "Where activations are kept between stages; auto: on the GPU as long as there is room, then in host memory, then on disk.", "auto, device, host or disk")
    stall_limit: float = _field(1800, "Seconds that one call of an actor may take before it counts as hung, and the actor is replaced.", "a number of seconds from 10", ge=10)
    profile: bool = _field(False, "Write where the time went to the run directory's profile/: a timeline (ui.perfetto.dev opens it), its picture, a table of stages.", "true or false")
    verbose: bool = _field(False, "Show the actors' logs and every stage as a line.", "true or false")

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity(cls, value: Any) -> str:
        return str(Pattern.parse(value))

    @field_validator("storage")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        if value is not None and "@" in urlsplit(value).netloc:
            raise UserError("--storage holds a user name or a key, which would be saved with the job; give the URL without, and keys in the environment.")
        return value

    @model_validator(mode="before")
    @classmethod
    def _go_together(cls, fields: dict) -> dict:
        """Options that mean nothing without another one are errors, not silence."""
        if not fields.get("quantize"):
            for name in ROUNDING:
                if fields.get(name) not in (None, False):
                    raise UserError(f"{_option(name)} is {fields[name]}, but without --quantize nothing is rounded; give both or neither.")
        if fields.get("no_pca") and fields.get("pca_reduction_factor") is not None:
            raise UserError(f"--pca-reduction-factor is {fields['pca_reduction_factor']}, but --no-pca leaves nothing to reduce; give one of the two.")
        return fields

    @model_validator(mode="after")
    def _something_to_do(self) -> "Job":
        if self.pattern.fraction == 0 and not self.quantize:
            raise UserError("--sparsity is 0 and --quantize is not given, so nothing would be done; give a sparsity, or --quantize for GPTQ alone.")
        return self

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity)

    @property
    def run_directory(self) -> Path:
        if self.output_dir:
            return Path(self.output_dir).absolute()
        name = self.model if self.model_size is None else f"{self.model}-{self.model_size}"
        bits = f"-{self.bits}bit" if self.quantize else ""
        return Path("runs", f"{Path(name).name}-{self.sparsity.replace(':', 'of')}{bits}-k{self.num_clusters}").absolute()

    def components(self, in_features: int) -> int | None:
        """Principal components kept for a linear's input; None without PCA."""
        return None if self.no_pca else in_features // self.pca_reduction_factor

    def dtype_on(self, device_type: str, checkpoint_dtype: str | None) -> str:
        """The name of the dtype that the job runs in."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if device_type == "cpu" else checkpoint_dtype or "float32"

    def recipe(self) -> dict:
        """The fields that decide what the shards hold, with their values."""
        names = ["sparsity", "quantize", "propagation"]
        names += ROUNDING if self.quantize else ()
        return {name: getattr(self, name) for name in names} | self.routers()

    def routers(self) -> dict:
        """The fields that decide what the routers are, of the same inputs."""
        names = ["num_clusters", "no_pca", "kmeans_restarts", "seed"]
        names += [] if self.no_pca else ["pca_reduction_factor"]
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        # Options that need another are left out without it, so that the file can be given back as --config.
        dropped = set() if self.quantize else set(ROUNDING)
        dropped |= {"pca_reduction_factor"} if self.no_pca else set()
        return yaml.safe_dump(self.model_dump(exclude=dropped), sort_keys=False)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def allowed(name: str) -> str:
    return Job.model_fields[name].json_schema_extra["allowed"]


def make_job(options: dict[str, Any], config: str | None = None) -> Job:
    """The job of a YAML file and the options given beside it, which win. Raises UserError, one sentence."""
    return job_of(read_fields(options, config), config)


def read_fields(options: dict[str, Any], config: str | None) -> dict[str, Any]:
    """What is given, unchecked."""
    return (_read_yaml(Path(config)) if config else {}) | {name: value for name, value in options.items() if value not in (None, (), [])}


def job_of(fields: dict[str, Any], config: str | None) -> Job:
    """The job of fields of which some may come from the YAML file `config`. Raises UserError, one sentence."""
    if "model" not in fields:
        raise UserError("--model is missing; allowed is a hub id, a local directory, demo, or pythia or llama with --model-size.")
    try:
        return Job(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name not in Job.model_fields:
            raise UserError(f"{config} has the field {name!r}, which is not known; known are {', '.join(Job.model_fields)}.") from None
        raise UserError(f"{_option(name)} is {first['input']!r}; allowed is {allowed(name)}.") from None


class _Loader(yaml.SafeLoader):
    """YAML whose 2:4 is text: to YAML 1.1 it is the number 124, in base 60."""


_Loader.yaml_implicit_resolvers = {first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:int"]
                                   for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"--config {path} is no file on this machine.")
    try:
        fields = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"--config {path} holds no fields; write one option a line, such as model: demo.")
    return {str(name).replace("-", "_"): value for name, value in fields.items() if value is not None}


def digest(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
