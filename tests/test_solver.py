"""The batched solver against the plain textbook one, weight by weight."""

import pytest
import torch

from pipeline.gram import hessian
from pipeline.pattern import Pattern
from pipeline.solver import Grid, find_grid, inverse_factor, solve
from tests import textbook


def problem(experts: int, rows: int, columns: int, tokens: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight and each expert's correlated tokens, all in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    tokens_NC = [torch.randn(tokens, columns, dtype=torch.float64, generator=generator)
                 @ torch.randn(columns, columns, dtype=torch.float64, generator=generator) for _ in range(experts)]
    return weight_RC, tokens_NC


CASES = [
    dict(sparsity="0.5"), dict(sparsity="0.8"), dict(sparsity="0.37"),
    dict(sparsity="2:4"), dict(sparsity="4:8"), dict(sparsity="1:4"), dict(sparsity="1:16"),
    dict(sparsity="0", bits=4), dict(sparsity="0.5", bits=4), dict(sparsity="2:4", bits=3), dict(sparsity="0.5", bits=8, group_size=64),
    dict(sparsity="2:4", bits=2, group_size=32, symmetric=True), dict(sparsity="0", bits=4, symmetric=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{name}{value}" for name, value in case.items()))
@pytest.mark.parametrize("columns", [96, 320])
def test_equals_textbook_in_float64(case: dict, columns: int):
    weight_RC, tokens_NC = problem(experts=3, rows=24, columns=columns, tokens=400, seed=columns)
    options = {name: value for name, value in case.items() if name != "sparsity"}
    pattern = Pattern.parse(case["sparsity"])
    hessians = torch.stack([textbook.hessian(tokens) for tokens in tokens_NC])
    grid = find_grid(weight_RC, options["bits"], options.get("group_size"), options.get("symmetric", False), mse=False) if options else None
    solved_ERC, _ = solve(weight_RC, inverse_factor(hessians), pattern, [24], grid)
    for expert, hessian_CC in enumerate(hessians):
        truth_RC = textbook.sparsegpt(weight_RC, hessian_CC, pattern.fraction if not pattern.is_n_of_m else 0, pattern.n, pattern.m, **options)
        assert torch.equal(solved_ERC[expert] == 0, truth_RC == 0)
        torch.testing.assert_close(solved_ERC[expert], truth_RC, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_float32_agrees_up_to_ties(sparsity: str):
    """The float32 path as a job runs it, from tokens: a weight may differ only in a row where a mask decision was a near tie."""
    weight_RC, tokens_NC = problem(experts=2, rows=64, columns=256, tokens=2000, seed=5)
    pattern = Pattern.parse(sparsity)
    hessians = torch.stack([hessian(tokens.float()) for tokens in tokens_NC])
    solved_ERC, _ = solve(weight_RC.float(), inverse_factor(hessians), pattern, [64])
    rows_that_differ = 0
    for expert, tokens in enumerate(tokens_NC):
        truth_RC = textbook.sparsegpt(weight_RC, textbook.hessian(tokens), pattern.fraction if not pattern.is_n_of_m else 0, pattern.n, pattern.m)
        same = ((solved_ERC[expert] == 0) == (truth_RC == 0)).all(dim=1)
        torch.testing.assert_close(solved_ERC[expert][same].double(), truth_RC[same], rtol=1e-3, atol=2e-3)
        rows_that_differ += int((~same).sum())
    assert rows_that_differ <= 4


def test_stacked_linears_keep_their_own_threshold_and_grid():
    """gate and up share a factor but not a threshold: stacked they must equal each solved alone."""
    gate_RC, tokens_NC = problem(experts=2, rows=16, columns=160, tokens=300, seed=1)
    up_RC = 3 * problem(experts=1, rows=40, columns=160, tokens=1, seed=2)[0]
    factor = inverse_factor(torch.stack([textbook.hessian(tokens) for tokens in tokens_NC]))
    grids = [find_grid(weight, 4, None, False, False) for weight in (gate_RC, up_RC)]
    stacked = Grid(torch.cat([grid.scale_RG for grid in grids]), torch.cat([grid.zero_RG for grid in grids]), 15, 160)
    together_ERC, _ = solve(torch.cat([gate_RC, up_RC]), factor, Pattern.parse("0.6"), [16, 40], stacked)
    for weight, grid, part in zip((gate_RC, up_RC), grids, together_ERC.split([16, 40], dim=1)):
        alone_ERC, _ = solve(weight, factor, Pattern.parse("0.6"), [len(weight)], grid)
        torch.testing.assert_close(part, alone_ERC, rtol=1e-10, atol=1e-10)


def test_loss_is_the_output_error():
    """What the columns' errors sum up to is |(w - w') X|^2 with the damping's share."""
    weight_RC, (tokens_NC,) = problem(experts=1, rows=8, columns=64, tokens=200, seed=3)
    hessian_CC = textbook.hessian(tokens_NC)
    solved_ERC, loss_ER = solve(weight_RC, inverse_factor(hessian_CC[None]), Pattern.parse("0.5"), [8])
    difference_RC = weight_RC - solved_ERC[0]
    damped_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(loss_ER[0], ((difference_RC @ damped_CC) * difference_RC).sum(1), rtol=1e-8, atol=1e-8)


def test_an_expert_does_not_depend_on_its_batch():
    weight_RC, tokens_NC = problem(experts=5, rows=32, columns=192, tokens=300, seed=4)
    hessians = torch.stack([textbook.hessian(tokens) for tokens in tokens_NC]).float()
    together_ERC, _ = solve(weight_RC.float(), inverse_factor(hessians), Pattern.parse("0.7"), [32])
    for expert in range(5):
        alone_ERC, _ = solve(weight_RC.float(), inverse_factor(hessians[expert:expert + 1]), Pattern.parse("0.7"), [32])
        assert torch.equal(together_ERC[expert], alone_ERC[0])


def test_dead_columns_are_zeroed():
    weight_RC, (tokens_NC,) = problem(experts=1, rows=8, columns=48, tokens=100, seed=6)
    tokens_NC[:, [3, 40]] = 0
    factor = inverse_factor(textbook.hessian(tokens_NC)[None])
    solved_ERC, _ = solve(weight_RC, factor, Pattern.parse("0.25"), [8])
    assert factor.dead_EC[0].nonzero().flatten().tolist() == [3, 40]
    assert (solved_ERC[0][:, [3, 40]] == 0).all()
    torch.testing.assert_close(solved_ERC[0], textbook.sparsegpt(weight_RC, textbook.hessian(tokens_NC), 0.25), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("columns", [80, 1100])
def test_factor_is_the_upper_factor_of_the_inverse(columns: int):
    _, tokens_NC = problem(experts=2, rows=1, columns=columns, tokens=4 * columns, seed=7)
    hessians = torch.stack([textbook.hessian(tokens) for tokens in tokens_NC])
    upper_ECC = inverse_factor(hessians).upper_ECC
    for hessian_CC, upper_CC in zip(hessians, upper_ECC):
        damped_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(columns)
        torch.testing.assert_close(upper_CC, torch.linalg.cholesky(torch.linalg.inv(damped_CC), upper=True), rtol=1e-5, atol=1e-7)


def test_damping_climbs_for_the_expert_that_needs_it_alone():
    _, (tokens_NC,) = problem(experts=1, rows=1, columns=32, tokens=100, seed=8)
    good_CC = textbook.hessian(tokens_NC)
    # An indefinite matrix (as float32 sums of nearly dependent columns can be) that 3 % of its mean diagonal makes definite.
    values, vectors = torch.linalg.eigh(good_CC)
    values[0] = -0.025 * good_CC.diagonal().mean()
    bad_CC = vectors @ values.diag() @ vectors.T
    factor = inverse_factor(torch.stack([good_CC, bad_CC, good_CC]))
    assert factor.damping_E.tolist() == pytest.approx([0.01, 0.03, 0.01])
    unit = 0.01 * bad_CC.diagonal().mean()
    damped_CC = bad_CC + 3 * unit * torch.eye(32)
    torch.testing.assert_close(factor.upper_ECC[1].T @ factor.upper_ECC[1], torch.linalg.inv(damped_CC), rtol=1e-6, atol=1e-8)
    assert torch.equal(factor.upper_ECC[0], factor.upper_ECC[2])


def test_damping_is_bounded():
    hessians = torch.full((1, 8, 8), torch.nan)
    with pytest.raises(ArithmeticError, match="not finite"):
        inverse_factor(hessians)


def test_fewer_tokens_than_columns():
    """The normal case of a small cluster: a rank-deficient Hessian is damped, not refused."""
    weight_RC, (tokens_NC,) = problem(experts=1, rows=8, columns=128, tokens=5, seed=9)
    solved_ERC, _ = solve(weight_RC.float(), inverse_factor(hessian(tokens_NC.float())[None]), Pattern.parse("0.5"), [8])
    assert solved_ERC.isfinite().all() and (solved_ERC == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_unstructured_threshold_takes_ties_as_published():
    """The threshold is the sorted score at index int(numel * sparsity), and everything up to it goes, ties included."""
    weight_RC = torch.ones(4, 8, dtype=torch.float64)
    solved_ERC, _ = solve(weight_RC, inverse_factor(torch.eye(8, dtype=torch.float64)[None]), Pattern.parse("0.5"), [4])
    assert (solved_ERC == 0).all()


@pytest.mark.parametrize("text, n, m, fraction", [("2:4", 2, 4, 0.5), ("(2, 4)", 2, 4, 0.5), ("(1,4)", 1, 4, 0.75), ("0.5", 0, 0, 0.5), ("0", 0, 0, 0)])
def test_pattern_reads(text: str, n: int, m: int, fraction: float):
    assert Pattern.parse(text) == Pattern(fraction, n, m)


@pytest.mark.parametrize("text", ["1.0", "-0.1", "4:2", "0:4", "abc", "", "nan", "2:2", "inf", "1:256", "0.5:4", "(2, 4"])
def test_pattern_refuses(text: str):
    with pytest.raises(ValueError, match="N kept of every M"):
        Pattern.parse(text)


def test_keeps_n_of_m():
    """N:M means N kept, as the field has it."""
    weight_RC, (tokens_NC,) = problem(experts=1, rows=8, columns=64, tokens=200, seed=10)
    solved_ERC, _ = solve(weight_RC, inverse_factor(textbook.hessian(tokens_NC)[None]), Pattern.parse("1:4"), [8])
    assert ((solved_ERC[0].view(8, 16, 4) != 0).sum(-1) == 1).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_grid_is_never_worse_and_keeps_zero(symmetric: bool):
    weight_RC = torch.randn(16, 128, generator=torch.Generator().manual_seed(11)) ** 3  # heavy tails: shrinking pays
    plain = find_grid(weight_RC, 3, 32, symmetric, mse=False)
    searched = find_grid(weight_RC, 3, 32, symmetric, mse=True)

    def error(grid: Grid) -> torch.Tensor:
        rounded = torch.stack([grid.round_column(weight_RC[None, :, column], column)[0] for column in range(128)], dim=1)
        return (rounded - weight_RC).abs().pow(2.4).view(16, 4, 32).sum(-1)

    assert (error(searched) <= error(plain) * (1 + 1e-5)).all() and error(searched).sum() < 0.97 * error(plain).sum()
    assert (searched.round_column(torch.zeros(1, 16), 40) == 0).all()


def test_a_last_group_may_be_narrower():
    weight_RC = torch.randn(4, 100, generator=torch.Generator().manual_seed(12))
    grid = find_grid(weight_RC, 8, 64, False, False)
    assert grid.scale_RG.shape == (4, 2)
    rounded = torch.stack([grid.round_column(weight_RC[None, :, column], column)[0] for column in range(100)], dim=1)
    assert (rounded - weight_RC).abs().max() <= grid.scale_RG.max() / 2 * 1.001

