"""Sums over tokens and principal components, against float64 and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from pipeline import principal
from pipeline.gram import TOKENS_PER_PRODUCT, chunks, gram, hessian, partial_sums, total

CPU = torch.device("cpu")


def tokens(count: int, columns: int) -> torch.Tensor:
    """Columns of very different scale, mixed, with a large common offset."""
    generator = torch.Generator().manual_seed(0)
    scale_C = torch.arange(1, columns + 1) ** -0.7
    turn_CC = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return torch.randn(count, columns, generator=generator) * scale_C @ turn_CC + 3 * torch.randn(columns, generator=generator)


def axes_of(tokens_NC: torch.Tensor, components: int, shares=((0, 1),), groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and axes by actors that hold these window groups, of equal size, each."""
    size = len(tokens_NC) // groups
    held = [tokens_NC[first * size:last * size] for first, last in shares]
    sizes = [[size] * (last - first) for first, last in shares]
    mean_C = principal.mean_of([principal.token_sums(part_NC, each, CPU) for part_NC, each in zip(held, sizes)], len(tokens_NC))
    parts = {}
    for (first, _), part_NC, each in zip(shares, held, sizes):
        parts |= principal.scatter_parts(part_NC, each, first, groups, mean_C, CPU)
    return mean_C, principal.leading_axes(parts, groups, len(tokens_NC), components, seed=0)


@pytest.mark.parametrize("count, columns", [(3, 8), (TOKENS_PER_PRODUCT + 5, 40), (300, 1100)])  # part of a chunk, several chunks, strips
def test_gram_is_the_sum_of_outer_products(count, columns):
    tokens_NC, centre_C = tokens(count, columns), torch.ones(columns)
    for centre in (None, centre_C):
        centred = tokens_NC.double() - (0 if centre is None else centre)
        truth_CC = centred.T @ centred
        torch.testing.assert_close(gram(tokens_NC, centre).double(), truth_CC, rtol=1e-4, atol=1e-6 * float(truth_CC.abs().max()))
    assert torch.equal(hessian(tokens_NC), gram(tokens_NC) * (2 / count))
    torch.testing.assert_close(gram(tokens_NC), gram(tokens_NC).T, rtol=1e-6, atol=0)  # within a strip the library's rounding may differ


def test_bfloat16_tokens_are_summed_exactly_as_their_float32_copies():
    tokens_NC = tokens(700, 30).bfloat16()
    torch.testing.assert_close(gram(tokens_NC), gram(tokens_NC.float()), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("whole", [2048, 64])  # a full decomposition, and subspace iteration for the leading ones
def test_axes_hold_as_much_variance_as_scikit_learns(whole, monkeypatch):
    monkeypatch.setattr(principal, "WHOLE", whole)
    tokens_NC = tokens(6000, 256)
    mean_C, axes_DC = axes_of(tokens_NC, 32)
    truth = PCA(32, svd_solver="full").fit(tokens_NC.double().numpy())
    np.testing.assert_allclose(mean_C.numpy(), truth.mean_, atol=1e-5)
    torch.testing.assert_close(axes_DC @ axes_DC.T, torch.eye(32), rtol=0, atol=1e-4)
    held = principal.project(tokens_NC, [len(tokens_NC)], mean_C, axes_DC, CPU).double().var(dim=0).sum()
    assert 0.998 * truth.explained_variance_.sum() <= held <= 1.0001 * truth.explained_variance_.sum()


def test_projection_is_scikit_learns():
    tokens_NC = tokens(500, 24)
    mean_C, axes_DC = axes_of(tokens_NC, 5)
    truth = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(tokens_NC.double().numpy())).float()
    projected = principal.project(tokens_NC, [len(tokens_NC)], mean_C, axes_DC, CPU)
    torch.testing.assert_close(projected.abs(), truth.abs(), rtol=1e-2, atol=1e-3)  # an axis may point either way


@pytest.mark.parametrize("shares", [[(0, 4), (4, 7)], [(0, 1), (1, 6), (6, 7)], [(0, 0), (0, 3), (3, 3), (3, 7)]])
def test_axes_are_the_same_bits_whoever_holds_the_tokens(shares):
    tokens_NC = tokens(700, 24)
    alone, together = axes_of(tokens_NC, 5, [(0, 7)], 7), axes_of(tokens_NC, 5, shares, 7)
    assert all(torch.equal(one, other) for one, other in zip(alone, together))


@pytest.mark.parametrize("groups", range(1, 12))
def test_the_tree_of_sums_is_the_same_however_the_groups_are_shared(groups):
    values = torch.rand(groups, 3, generator=torch.Generator().manual_seed(groups)) * 10.0 ** torch.arange(groups)[:, None]
    whole = total(partial_sums(lambda group: values[group].clone(), range(groups), groups), 0, groups)
    torch.testing.assert_close(whole, values.sum(0))
    for cut in range(groups + 1):
        parts = partial_sums(lambda group: values[group].clone(), range(cut), groups) | partial_sums(lambda group: values[group].clone(), range(cut, groups), groups)
        assert torch.equal(total(parts, 0, groups), whole)


def test_pieces_do_not_depend_on_the_parts_that_tokens_come_in():
    tokens_NC = tokens(2 * TOKENS_PER_PRODUCT + 100, 3)
    whole = list(chunks(tokens_NC))
    assert [len(piece_NC) for piece_NC in whole] == [TOKENS_PER_PRODUCT, TOKENS_PER_PRODUCT, 100]
    parts = tokens_NC.split([10, 0, 5000, len(tokens_NC) - 5010])
    assert all(torch.equal(one, other) for one, other in zip(whole, chunks(parts), strict=True))
    assert torch.equal(gram(parts), gram(tokens_NC)) and torch.equal(hessian(parts), hessian(tokens_NC))
