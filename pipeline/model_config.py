"""A model's configuration, dense or expanded, read in a moment: without the code of any model."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from pipeline.architectures import architecture_of
from pipeline.errors import UserError

EXPANDED = "sparse_expansion"


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration, without running code from the directory. Raises UserError if there is none, or of an unknown type."""
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"--model {directory} is no model directory: it holds no config.json.")
    try:
        config_dict, _ = PretrainedConfig.get_config_dict(directory)
        if config_dict.get("model_type") == EXPANDED:
            from pipeline.modeling_sparse_expansion import SparseExpansionConfig  # takes seconds to import

            return SparseExpansionConfig.from_dict(config_dict)
        architecture_of(config_dict.get("model_type"), str(directory))
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{Path(directory) / 'config.json'} is damaged: {' '.join(str(error).split())}") from None


def is_expanded(config: PretrainedConfig) -> bool:
    return config.model_type == EXPANDED
