"""A model's sizes from its configuration alone: no weights, and of the hub nothing but config.json."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline import sources
from pipeline.architectures import architecture_of
from pipeline.errors import UserError
from pipeline.footprint import BlockShape, shape_of
from pipeline.model_config import is_expanded, read_config
from pipeline.preflight import Source


@dataclass(frozen=True)
class ModelShape:
    """`shell`: parameters outside the blocks (embeddings, head, norms; tied ones once). attention: features of all of a block's
    attention heads together. linears: of each router."""

    blocks: int
    block: BlockShape
    linears: tuple[int, ...]
    shell: int
    vocabulary: int
    attention: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelShape":
        """Counted on a skeleton of one block without storage, which knows every architecture's own parameters."""
        architecture = architecture_of(config.model_type, config.name_or_path)
        one = copy.deepcopy(config)
        one.num_hidden_layers = 1
        if getattr(one, "layer_types", None):
            one.layer_types = one.layer_types[:1]
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(one)
        block = skeleton.get_submodule(architecture.blocks)[0]
        shape = shape_of(block, architecture)
        shell = sum(parameter.numel() for parameter in skeleton.parameters()) - shape.parameters
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, shape, tuple(map(len, architecture.router_groups)), shell, config.vocab_size, config.num_attention_heads * width)

    @property
    def parameters(self) -> int:
        """Of the dense model."""
        return self.shell + self.blocks * self.block.parameters


def find_config(model: str, model_size: str | None, revision: str | None, cache_dir: str | None) -> Source:
    """The model as `preflight.find_model` gives it, but for its weights, which need not be there. Raises UserError as that does."""
    name, hub_revision = sources.hub_id(model, model_size, revision)
    on_hub = name.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).is_dir()
    if on_hub:
        directory, revision = _config_from_hub(name, hub_revision, cache_dir), hub_revision
    else:
        directory, revision = sources.fetch(model, model_size, revision, cache_dir)
    source = Source(directory, name if on_hub else model, revision, read_config(directory), fingerprint="")
    if is_expanded(source.config):
        raise UserError(f"--model {source.name} is already expanded; give the dense model it came from.")
    return source


def _config_from_hub(name: str, revision: str | None, cache_dir: str | None) -> Path:
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, cache_dir=cache_dir)).parent
    except LocalEntryNotFoundError:
        raise UserError(f"--model {name} is neither a local directory nor in the cache, and the hub cannot be reached or HF_HUB_OFFLINE is set; "
                        "a directory that holds its config.json is enough.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--model {name}: the hub does not give its config.json (gated models need HF_TOKEN): {' '.join(str(error).split())[:200]}") from None
