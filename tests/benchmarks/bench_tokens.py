"""Hessians by expert and the fit of a router, beside masks and running means, and beside every restart over all tokens.

Floors: a Hessian is N C^2 operations (a sum of symmetric products) at the rate of a large matrix product in the tokens' own
type, or reading the tokens once; a fit is the same for the covariance, and 2 N C D for the projection.
"""

import pytest
import torch

from pipeline import routing
from pipeline.expansion import TokensByExpert
from pipeline.gram import hessian
from tests.benchmarks import plain
from tests.benchmarks.measure import DEVICE, ON_GPU, copy_rate, product_rate, seconds

EXPERTS = 16
TOKENS = {False: [(65536, 1024, 8, torch.float32)], True: [(262144, 2048, 8, torch.bfloat16), (524288, 11008, 32, torch.bfloat16)]}[ON_GPU]


def blobs(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Clustered tokens, each column of its own scale."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    centres = torch.randn(64, columns, generator=generator, device=DEVICE)
    scale_C = torch.arange(1, columns + 1, device=DEVICE) ** -0.5
    tokens_NC = torch.empty(tokens, columns, dtype=dtype, device=DEVICE)
    for part_NC in tokens_NC.split(16384):
        labels = torch.randint(64, (len(part_NC),), generator=generator, device=DEVICE)
        part_NC.copy_((centres[labels] + torch.randn(part_NC.shape, generator=generator, device=DEVICE)) * scale_C)
    return tokens_NC


@pytest.mark.parametrize("tokens, columns, factor, dtype", TOKENS)
def test_hessians(tokens, columns, factor, dtype, benchmark, record):
    rate, reads = product_rate(dtype), copy_rate()
    tokens_NC = blobs(tokens, columns, dtype)
    labels_N = torch.randint(EXPERTS, (tokens,), device=DEVICE)

    def ours() -> None:
        by_expert = TokensByExpert(tokens_NC, labels_N, EXPERTS)
        for expert in range(EXPERTS):
            hessian(by_expert.of(expert))

    here = benchmark.pedantic(lambda: seconds(ours), rounds=1)
    masked = seconds(lambda: plain.hessians(tokens_NC, labels_N, EXPERTS, 2048), 1, warm=False)
    record(f"Hessians of {EXPERTS} experts, {tokens} x {columns} {str(dtype)[6:]}", here, max(tokens * columns**2 / rate, tokens_NC.nbytes / reads), masked)


@pytest.mark.parametrize("tokens, columns, factor, dtype", TOKENS)
def test_router(tokens, columns, factor, dtype, benchmark, record):
    tokens_NC, components = blobs(tokens, columns, dtype), columns // factor
    here = benchmark.pedantic(lambda: seconds(lambda: routing.fit(tokens_NC, EXPERTS, components, 10, 0), 1), rounds=1)
    copies_fit = tokens_NC.numel() * 12 < 40e9  # the plain way holds everything in float32
    full = seconds(lambda: plain.fit(tokens_NC, EXPERTS, components, 10), 1, warm=ON_GPU) if copies_fit else None
    floor = tokens * columns**2 / product_rate(dtype) + 2 * tokens * columns * components / product_rate()
    record(f"router of {EXPERTS}, {tokens} x {columns} {str(dtype)[6:]}, PCA / {factor}, 10 restarts", here, floor, full)
