"""Packed experts: bit for bit what was packed, read by this project and by the book; small; and safe to read when they are damaged."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packed_experts import check, digits_in_a_word, unpack
from pipeline.packing import choose_form, joined, minimum_bytes, pack
from pipeline.pattern import Pattern
from pipeline.solver.quantizer import find_grid
from tests.packed import random_experts, read_plainly

PATTERNS = ["0", "0.3", "0.5", "0.8", "0.97", "1:2", "2:4", "1:4", "3:4", "4:8", "7:16", "2:32"]


def columns_for(sparsity: str, groups: int) -> int:
    pattern = Pattern.parse(sparsity)
    return groups * pattern.m if pattern.is_n_of_m else groups + 3


@settings(max_examples=120, deadline=None)
@given(sparsity=st.sampled_from(PATTERNS), groups=st.integers(1, 30), rows=st.integers(1, 9), experts=st.integers(1, 4), bits=st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8]),
       width=st.sampled_from([None, 1, 4, 7, 16]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_what_is_packed_comes_back_bit_for_bit(sparsity, groups, rows, experts, bits, width, dtype, seed):
    form, parts, weight_ERC = random_experts(experts, rows, columns_for(sparsity, groups), sparsity, bits, width, dtype, seed)
    if form is None:
        assert not bits and Pattern.parse(sparsity).fraction < 0.1
        return
    check(form, parts, "linear")
    plain = {name: (part.float() if part.dtype == torch.bfloat16 else part).numpy() for name, part in parts.items()}
    for expert in range(experts):
        found = unpack(form, parts, expert, dtype)
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), weight_ERC[expert].view(torch.uint8))
        by_the_book = torch.from_numpy(read_plainly(form.to_dict(), plain, expert)).to(dtype)
        assert torch.equal(by_the_book, weight_ERC[expert])


def test_what_is_not_of_the_form_is_refused():
    form = choose_form(Pattern.parse("2:4"), 0, None, 1, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="more than 2 of 4"):
        pack(form, torch.ones(2, 8), None)
    dense_RC = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    grid = find_grid(dense_RC, 4, None, False, False)
    with pytest.raises(ValueError, match="not on its grid"):
        pack(choose_form(Pattern.parse("0.5"), 4, None, 1, 2, 8, torch.float32), dense_RC, grid)


def test_a_negative_zero_and_empty_experts_come_back():
    form = choose_form(Pattern.parse("0.5"), 0, None, 2, 2, 8, torch.float32)
    weight_RC = torch.zeros(2, 8)
    weight_RC[1, 3] = -0.0
    parts = joined(form, [pack(form, weight_RC, None), pack(form, torch.zeros(2, 8), None)], {})
    check(form, parts, "linear")
    assert torch.equal(unpack(form, parts, 0).view(torch.int32), weight_RC.view(torch.int32)) and not unpack(form, parts, 1).any()


def test_values_have_gradients():
    for form, parts, _ in (random_experts(2, 5, 16, "2:4"), random_experts(2, 5, 16, "0.5")):
        parts["values"].requires_grad_(True)
        unpack(form, parts, 1).square().sum().backward()
        assert torch.equal(parts["values"].grad.flatten()[-4:], 2 * parts["values"].detach().flatten()[-4:])


@pytest.mark.parametrize("choices", [2, 3, 4, 6, 70, 12870])
def test_as_many_digits_as_a_word_holds(choices):
    assert choices ** digits_in_a_word(choices) <= 2**32 < choices ** (digits_in_a_word(choices) + 1)


@pytest.mark.parametrize("sparsity, bits, width, dtype", [("0.5", 0, None, torch.bfloat16), ("0.5", 0, None, torch.float32), ("2:4", 0, None, torch.bfloat16),
                                                          ("2:4", 4, None, torch.bfloat16), ("2:4", 4, 128, torch.bfloat16), ("4:8", 3, None, torch.bfloat16)])
def test_size_is_near_the_least(sparsity, bits, width, dtype):
    """Of what experts have of their own: scales and zero points are shared by all of them."""
    form, parts, weight_ERC = random_experts(2, 256, 1536, sparsity, bits, width, dtype)
    size = sum(part.nbytes for name, part in parts.items() if name not in ("scale", "zero"))
    kept = [form.rows * form.kept] * 2 if form.index == "pattern" else [int((weight_RC != 0).sum()) for weight_RC in weight_ERC]
    assert 1 <= size / minimum_bytes(form, kept, bits or 8 * dtype.itemsize) < 1.03


FORMS = [("0.5", 0, None), ("0.7", 4, 8), ("2:4", 0, None), ("2:4", 4, None), ("4:8", 3, 8), ("0", 5, None)]


def test_damaged_parts_are_named_or_read_within_bounds():
    """10,000 changes of tensors, their shapes and the form: an error that names the tensor, or a weight of the right shape that the
    parts really hold."""
    choose, named, read = random.Random(0), 0, 0
    for number in range(10_000):
        sparsity, bits, width = FORMS[number % len(FORMS)]
        form, parts, _ = CACHED.setdefault((sparsity, bits, width), random_experts(2, 6, 16, sparsity, bits, width))
        parts = dict(parts)
        victim = choose.choice(list(parts))
        tensor = parts[victim]
        kind = choose.randrange(5)
        if kind < 2 and tensor.numel():
            data = np.frombuffer(tensor.numpy().tobytes(), np.uint8).copy()
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            parts[victim] = torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)
        elif kind == 2:
            parts[victim] = tensor[..., :-1].contiguous()
        elif kind == 3:
            parts[victim] = tensor.to(choose.choice([torch.int8, torch.int32, torch.float32, torch.int64]))
        else:
            field = choose.choice(["experts", "rows", "columns", "n", "m", "bits", "width"])
            form = dataclasses.replace(form, **{field: choose.choice([-1, 0, 1, 2, 3, 5, 9, 1 << 40])})
        try:
            check(form, parts, "layer.linear")
        except ValueError as error:
            assert str(error).startswith("layer.linear")
            named += 1
            continue
        plain = {name: part.numpy() for name, part in parts.items()}
        for expert in range(form.experts):
            found = unpack(form, parts, expert)
            assert found.shape == (form.rows, form.columns)
            assert np.array_equal(found.float().numpy(), read_plainly(form.to_dict(), plain, expert).astype(np.float32), equal_nan=True)
        read += 1
    assert named > 4000 and read > 1000


CACHED: dict = {}
