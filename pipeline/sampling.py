"""Windows sampled from the model itself, for --dataset self: calibration without any text.

Shapes: W windows, L tokens of a window.
"""

import inspect
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

TOKENS_PER_BATCH = 32768  # of windows sampled together: 16 GB of keys and values in a 7B model; fixed, so that the windows do not depend on the machine


@torch.no_grad()
def sample_windows(directory: Path, count: int, length: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Windows (W, L) of int64 ids drawn token by token from the model's own distribution (temperature 1).

    Each window starts with a token drawn uniformly from the vocabulary. A seeded generator draws everything. This is the
    one stage that needs the whole model in one process: token by token, every block is needed each time.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # Of a fixed size: a cache that grows is copied at every token. Its argument's name depends on the version of transformers.
    argument = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    batches = []
    batch = max(1, TOKENS_PER_BATCH // length)
    for start in range(0, count, batch):
        windows = min(batch, count - start)
        ids = torch.randint(model.config.vocab_size, (windows, 1), generator=generator)
        drawn, cache = [ids], StaticCache(config=model.config, max_cache_len=length)
        for _ in range(length - 1):
            logits_WV = model(input_ids=ids.to(device), use_cache=True, **{argument: cache}).logits[:, -1]
            ids = _draw(logits_WV.float().softmax(-1).cpu(), generator)
            drawn.append(ids)
        batches.append(torch.cat(drawn, dim=1))
    del model, cache
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the whole model and its cache: the job that follows, and cuML, need the room
    return torch.cat(batches)


def _draw(probability_WV: Tensor, generator: torch.Generator) -> Tensor:
    """One token (W, 1) from each distribution, by inverting its cumulative sum (torch.multinomial is ten times slower)."""
    cumulative_WV = probability_WV.cumsum(-1)
    uniform_W1 = torch.rand(len(probability_WV), 1, generator=generator) * cumulative_WV[:, -1:]
    return torch.searchsorted(cumulative_WV, uniform_W1, right=True).clamp_(max=probability_WV.shape[1] - 1)
