"""Which linears are expanded, and which of them share a router, by model type."""

from dataclasses import dataclass

from pipeline.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """`blocks`: path of the list of transformer blocks inside the causal LM. `router_groups`: linears by their path in a
    block; those of one group read the same input and share a router. The first group reads the FFN input, the second the
    input of the down projection, which is the last linear to run. `attention`: path in a block of what runs before both."""

    blocks: str
    router_groups: tuple[tuple[str, ...], ...]
    attention: str = "self_attn"


_GATED = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

ARCHITECTURES = {
    "gpt_neox": Architecture("gpt_neox.layers", (("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)), "attention"),
    "llama": Architecture("model.layers", _GATED),
    "mistral": Architecture("model.layers", _GATED),
    "qwen2": Architecture("model.layers", _GATED),
    "qwen3": Architecture("model.layers", _GATED),
    "olmo2": Architecture("model.layers", _GATED),
    "gemma2": Architecture("model.layers", _GATED),
    "phi": Architecture("model.layers", (("mlp.fc1",), ("mlp.fc2",))),
    "opt": Architecture("model.decoder.layers", (("fc1",), ("fc2",))),
}

# Parameters that checkpoints of other transformers versions store under another name.
RENAMED = {"lm_head.": "embed_out."}


def architecture_of(model_type: str, where: str) -> Architecture:
    """Raises UserError, naming the known model types, for any other."""
    if model_type not in ARCHITECTURES:
        raise UserError(f"--model {where} is of type {model_type!r}, which is not known here; known types are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[model_type]
