"""Windows sampled with a cache of fixed size, against drawing each token from the whole window so far."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.sampling import _draw, sample_windows
from tests.models import save_tiny


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma2", "opt"])  # gemma2: windows longer than its sliding ones
def test_samples_equal_those_without_a_cache(model_type, tmp_path):
    directory = save_tiny(tmp_path / "model", model_type)
    sampled_WL = sample_windows(directory, 6, 20, 7, torch.device("cpu"), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    generator = torch.Generator().manual_seed(7)
    ids_WL = torch.randint(model.config.vocab_size, (6, 1), generator=generator)
    for _ in range(19):
        ids_WL = torch.cat([ids_WL, _draw(model(ids_WL, use_cache=False).logits[:, -1].softmax(-1), generator)], dim=1)
    assert torch.equal(sampled_WL, ids_WL)


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3])
    drawn = _draw(probability.expand(40000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0], minlength=5) / 40000
    assert shares[0] == shares[3] == 0
    torch.testing.assert_close(shares, probability, atol=0.01, rtol=0)
