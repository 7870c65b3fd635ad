"""Tiny random models of every known architecture, saved as a user would save them."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)

CONFIGS = {
    "gpt_neox": dict(intermediate_size=64),
    "llama": dict(intermediate_size=48, num_key_value_heads=2),
    "mistral": dict(intermediate_size=48, num_key_value_heads=2, sliding_window=8, head_dim=8),
    "qwen2": dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "olmo2": dict(intermediate_size=48, num_key_value_heads=2),
    # Layers alternate between a sliding window and full attention, so blocks are called with different masks.
    "gemma2": dict(intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "phi": dict(intermediate_size=64),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=16),
}


def tiny_model(model_type: str, seed: int = 0, **changes):
    """A randomly initialised causal LM in float32 with weights large enough that every layer matters."""
    options = SHAPE | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | CONFIGS[model_type] | changes
    config = AutoConfig.for_model(model_type, **options)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)
    return model


def save_tiny(directory: Path, model_type: str = "gpt_neox", seed: int = 0, **changes) -> Path:
    tiny_model(model_type, seed, **changes).save_pretrained(directory)
    return directory


def token_windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))
