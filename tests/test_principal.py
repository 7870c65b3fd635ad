"""Sums over tokens and principal components, against float64 and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from pipeline import principal
from pipeline.gram import TOKENS_PER_PRODUCT, gram, hessian


def tokens(count: int, columns: int) -> torch.Tensor:
    """Columns of very different scale, mixed, with a large common offset."""
    generator = torch.Generator().manual_seed(0)
    scale_C = torch.arange(1, columns + 1) ** -0.7
    turn_CC = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return torch.randn(count, columns, generator=generator) * scale_C @ turn_CC + 3 * torch.randn(columns, generator=generator)


@pytest.mark.parametrize("count, columns", [(3, 8), (TOKENS_PER_PRODUCT + 5, 40), (300, 1100)])  # part of a chunk, several chunks, strips
def test_gram_is_the_sum_of_outer_products(count, columns):
    tokens_NC, centre_C = tokens(count, columns), torch.ones(columns)
    for centre in (None, centre_C):
        centred = tokens_NC.double() - (0 if centre is None else centre)
        truth_CC = centred.T @ centred
        torch.testing.assert_close(gram(tokens_NC, centre).double(), truth_CC, rtol=1e-4, atol=1e-6 * float(truth_CC.abs().max()))
    assert torch.equal(hessian(tokens_NC), gram(tokens_NC) * (2 / count)) and torch.equal(gram(tokens_NC), gram(tokens_NC).T)


def test_bfloat16_tokens_are_summed_exactly_as_their_float32_copies():
    tokens_NC = tokens(700, 30).bfloat16()
    torch.testing.assert_close(gram(tokens_NC), gram(tokens_NC.float()), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("whole", [2048, 64])  # a full decomposition, and subspace iteration for the leading ones
def test_axes_hold_as_much_variance_as_scikit_learns(whole, monkeypatch):
    monkeypatch.setattr(principal, "WHOLE", whole)
    tokens_NC = tokens(6000, 256)
    mean_C, axes_DC = principal.principal_axes(tokens_NC, 32, seed=0)
    truth = PCA(32, svd_solver="full").fit(tokens_NC.double().numpy())
    np.testing.assert_allclose(mean_C.numpy(), truth.mean_, atol=1e-5)
    torch.testing.assert_close(axes_DC @ axes_DC.T, torch.eye(32), rtol=0, atol=1e-4)
    held = principal.project(tokens_NC, mean_C, axes_DC).double().var(dim=0).sum()
    assert 0.998 * truth.explained_variance_.sum() <= held <= 1.0001 * truth.explained_variance_.sum()


def test_projection_is_scikit_learns():
    tokens_NC = tokens(500, 24)
    mean_C, axes_DC = principal.principal_axes(tokens_NC, 5, seed=0)
    truth = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(tokens_NC.double().numpy())).float()
    projected = principal.project(tokens_NC, mean_C, axes_DC)
    torch.testing.assert_close(projected.abs(), truth.abs(), rtol=1e-2, atol=1e-3)  # an axis may point either way
