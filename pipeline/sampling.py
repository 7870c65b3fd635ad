"""Windows sampled from the model itself, for --dataset self: calibration without any text.

Shapes: W windows, L tokens of a window.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

TOKENS_PER_BATCH = 32768  # of windows sampled together: 16 GB of keys and values in a 7B model; fixed, so that the windows do not depend on the machine
CACHE_NAMES = ("cache", "past_key_values")  # of a model's output and argument, by version of transformers


@torch.no_grad()
def sample_windows(directory: Path, count: int, length: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Windows (W, L) of int64 ids drawn token by token from the model's own distribution (temperature 1).

    Each window starts with a token drawn uniformly from the vocabulary. A seeded generator draws everything. This is the
    one stage that needs the whole model in one process: token by token, every block is needed each time.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    batches = []
    batch = max(1, TOKENS_PER_BATCH // length)
    for start in range(0, count, batch):
        windows = min(batch, count - start)
        ids = torch.randint(model.config.vocab_size, (windows, 1), generator=generator)
        drawn, cache = [ids], {}
        for _ in range(length - 1):
            output = model(input_ids=ids.to(device), use_cache=True, **cache)
            cache = {name: output[name] for name in CACHE_NAMES if name in output}
            ids = torch.multinomial(output.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            drawn.append(ids)
        batches.append(torch.cat(drawn, dim=1))
    return torch.cat(batches)
