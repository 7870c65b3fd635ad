"""A model, dense or saved by `run`, loaded whole by transformers: for a look at what it writes."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.errors import UserError
from pipeline.model_config import is_expanded, read_config
from pipeline.modeling_sparse_expansion import SparseExpansionConfig, SparseExpansionForCausalLM, check_sums


@dataclass
class Loaded:
    model: PreTrainedModel
    tokenizer: object

    def ids(self, text: str) -> torch.Tensor:
        """Token ids (1, L)."""
        return self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)


def saved_config(directory: Path) -> SparseExpansionConfig:
    """Raises UserError if the directory holds no model that run has saved."""
    config = read_config(directory)
    if not is_expanded(config):
        raise UserError(f"{directory} holds a dense model; allowed is one that run has saved.")
    return config


def demand_whole(directory: Path) -> None:
    """Raises UserError if a file of a saved model is not what was saved."""
    try:
        check_sums(directory)
    except ValueError as error:
        raise UserError(str(error)) from None


def load(directory: Path) -> Loaded:
    """In the dtype in which it is stored, on the GPU if there is one. Raises UserError if it cannot be read."""
    config = read_config(directory)
    kind = SparseExpansionForCausalLM if is_expanded(config) else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = kind.from_pretrained(directory, dtype="auto").to(device).eval()
        if device == "cpu" and kind is SparseExpansionForCausalLM:
            model.unpack()  # a CPU would take longer to unpack than to compute
    except (ValueError, OSError) as error:
        raise UserError(f"{directory} cannot be loaded: {' '.join(str(error).split())}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{directory} has no tokenizer that can be read ({' '.join(str(error).split())[:150]}).") from None
    return Loaded(model, tokenizer)


@torch.no_grad()
def complete(loaded: Loaded, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """What the model writes after a prompt. temperature 0: always the likeliest token."""
    torch.manual_seed(seed)
    ids_1L = loaded.ids(prompt)
    if not ids_1L.shape[1]:
        raise UserError("--prompt is empty; give some text to go on from.")
    sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else loaded.tokenizer.eos_token_id
    written = loaded.model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return loaded.tokenizer.decode(written[0, ids_1L.shape[1]:], skip_special_tokens=True)


def existing(directory: str, option: str) -> Path:
    """Raises UserError if it is no directory."""
    if not os.path.isdir(directory):
        raise UserError(f"{option} {directory} is no directory; give one that run has saved (RUN/model).")
    return Path(directory)
