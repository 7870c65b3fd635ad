"""Packed experts on a GPU, as Triton kernels: unpacked for many tokens, or read directly for a few, where the bytes read decide.

This file travels inside every saved model and needs torch and triton alone. Its plain twins are in `packed_experts`. It runs
without a GPU too, in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests compare it with them.
Shapes: N tokens, E experts, R rows (out features), C columns (in features).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed_experts import Form, bits_of, code_bytes, positions

LANES = 32  # columns of a word of the mask
UNROLL = 8  # words of the mask that are read ahead
ROWS = 4  # of a program
GROUPS = 256  # of a program that unpacks a pattern
WORDS, WORD_ROWS = 32, 8  # of a program that multiplies by a pattern


def can_unpack(form: Form) -> bool:
    """Is there a kernel for this form? (Others are unpacked by `packed_experts`.)"""
    return form.bits in (0, 2, 4, 8) and (form.index == "pattern" or form.index == "mask" and form.columns % LANES == 0)


def can_multiply(form: Form) -> bool:
    if form.index == "mask":
        return can_unpack(form)
    return form.index == "pattern" and (form.n, form.m) == (2, 4) and form.bits in (0, 4) and form.groups % 4 == 0 and (not form.bits or form.width % form.m == 0)


def row_starts(form: Form, parts: dict[str, Tensor]) -> Tensor:
    """With a mask: where every row's values begin (E, R), counted in values from the expert's first, int32."""
    counts = torch.stack([bits_of(mask)[:form.rows * form.columns].view(form.rows, form.columns).sum(1, dtype=torch.int32) for mask in parts["mask"]])
    return (counts.cumsum(1) - counts).to(torch.int32)


def first_stored(form: Form, parts: dict[str, Tensor]) -> Tensor:
    """With a mask: where every expert's values (or bytes of codes) begin (E), int64."""
    return torch.tensor(code_bytes(parts["starts"], form.bits)[:-1], device=parts["starts"].device) if form.bits else parts["starts"][:-1]


@triton.jit
def _ones(word):
    """Bits set in 32-bit words."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _stored(kept, place, is_kept, scale_at, zero_at, BITS: tl.constexpr):
    """Kept weights, float32: values as they are, or codes on their grid."""
    if BITS == 0:
        return tl.load(kept + place, mask=is_kept, other=0.0).to(tl.float32)
    bit = place * BITS
    code = (tl.load(kept + bit // 8, mask=is_kept, other=0).to(tl.int32) >> (bit % 8)) & ((1 << BITS) - 1)
    scale = tl.load(scale_at, mask=is_kept, other=0.0)
    return scale * (code.to(tl.float32) - tl.load(zero_at, mask=is_kept, other=0).to(tl.float32))


@triton.jit
def _mask_kernel(tokens, experts, mask, starts, first, kept, scale, zero, out, rows, columns, words, spans, width, token_stride,
                 BITS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, MULTIPLY: tl.constexpr):
    """A program goes along some rows of the expert of its token, a word of the mask at a time; a lane is a column, whose value lies
    as many values into the word's as the mask has bits before it."""
    token = tl.program_id(1)
    expert = tl.load(experts + token).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    is_row = row < rows
    at = tl.load(starts + expert * rows + row, mask=is_row, other=0)
    kept += tl.load(first + expert)
    mask += (expert * rows + row) * words
    before = ((1 << lane.to(tl.int64)) - 1).to(tl.uint32)[None, :]
    sums = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, words, UNROLL):
        for step in tl.static_range(UNROLL):
            number = begin + step
            word = tl.load(mask + number, mask=is_row & (number + 0 * row < words), other=0).to(tl.uint32, bitcast=True)
            is_kept = ((word[:, None] >> lane.to(tl.uint32)[None, :]) & 1) == 1
            place = at[:, None] + _ones(word[:, None] & before)
            column = number * LANES + lane
            span = row[:, None] * spans + (column // width)[None, :]
            weight = _stored(kept, place, is_kept, scale + span, zero + span, BITS)
            if MULTIPLY:
                token_C = tl.load(tokens + token * token_stride + column, mask=column < columns, other=0.0).to(tl.float32)
                sums += tl.where(is_kept, weight, 0.0) * token_C[None, :]
            else:
                tl.store(out + row[:, None] * columns + column[None, :], tl.where(is_kept, weight, 0.0).to(out.dtype.element_ty),
                         mask=is_row[:, None] & (column < columns)[None, :])
            at += _ones(word)
    if MULTIPLY:
        tl.store(out + token * rows + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _pattern_kernel(words, kept, scale, zero, table, out, columns, words_of_row, stored_of_row, spans, width,
                    N: tl.constexpr, M: tl.constexpr, CHOICES: tl.constexpr, DIGITS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Unpack groups of a row: a lane is a group of M columns."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    is_group = group < columns // M
    word = tl.load(words + row * words_of_row + group // DIGITS, mask=is_group, other=0).to(tl.uint32, bitcast=True)
    digit = word
    for place in tl.static_range(DIGITS - 1):
        digit = tl.where(group % DIGITS > place, digit // CHOICES, digit)
    digit = (digit % CHOICES).to(tl.int32)
    kept += row * stored_of_row
    for place in tl.static_range(M):
        column = group * M + place
        span = row * spans + column // width
        weight = tl.zeros((GROUPS,), tl.float32)
        for number in tl.static_range(N):
            here = is_group & (tl.load(table + digit * N + number, mask=is_group, other=0) == place)
            weight += tl.where(here, _stored(kept, group * N + number, here, scale + span, zero + span, BITS), 0.0)
        tl.store(out + row * columns + column, weight.to(out.dtype.element_ty), mask=is_group)


@triton.jit
def _two_of_four_kernel(tokens, experts, words, kept, scale, zero, out, rows, groups, words_of_row, spans, width,
                        BITS: tl.constexpr, ONE_SPAN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Multiply by experts of which 2 of 4 columns are kept. A lane owns a word, whose 12 choices it takes off one after the other.

    tokens: (N, 48, W) float32, so that lanes read side by side. kept: with codes 3 words of 8 codes for every word of choices.
    """
    token = tl.program_id(1)
    expert = tl.load(experts + token).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    tokens += token * 48 * words_of_row
    line = (expert * rows + row)[:, None]
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    if ONE_SPAN and BITS:
        offset = tl.load(zero + row, mask=is_row, other=0).to(tl.float32)[:, None]
    for begin in range(0, words_of_row, WORDS):
        number = begin + tl.arange(0, WORDS)
        there = is_row[:, None] & (number < words_of_row)[None, :]
        left = tl.load(words + line * words_of_row + number[None, :], mask=there, other=0).to(tl.uint32, bitcast=True)
        for place in tl.static_range(12):
            digit = left % 6
            left = left // 6
            group = number * 12 + place
            inside = there & (group < groups)[None, :]
            base = tokens + place * 4 * words_of_row + number
            token_0 = tl.load(base, mask=number < words_of_row, other=0.0)[None, :]
            token_1 = tl.load(base + words_of_row, mask=number < words_of_row, other=0.0)[None, :]
            token_2 = tl.load(base + 2 * words_of_row, mask=number < words_of_row, other=0.0)[None, :]
            token_3 = tl.load(base + 3 * words_of_row, mask=number < words_of_row, other=0.0)[None, :]
            first = tl.where(digit < 3, token_0, tl.where(digit < 5, token_1, token_2))
            second = tl.where(digit == 0, token_1, tl.where((digit == 1) | (digit == 3), token_2, token_3))
            if BITS == 4:
                if place % 4 == 0:
                    codes = tl.load(kept + line * (groups // 4) + (number * 3 + place // 4)[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
                low = ((codes >> (8 * (place % 4))) & 15).to(tl.int32).to(tl.float32)
                high = ((codes >> (8 * (place % 4) + 4)) & 15).to(tl.int32).to(tl.float32)
                if ONE_SPAN:
                    sums += first * (low - offset) + second * (high - offset)
                else:
                    span = row[:, None] * spans + (group * 4 // width)[None, :]
                    offset = tl.load(zero + span, mask=inside, other=0).to(tl.float32)
                    sums += tl.load(scale + span, mask=inside, other=0.0) * (first * (low - offset) + second * (high - offset))
            else:
                pair = kept + line * (2 * groups) + (2 * group)[None, :]
                sums += first * tl.load(pair, mask=inside, other=0.0).to(tl.float32) + second * tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(sums, 1)
    if ONE_SPAN and BITS:
        total *= tl.load(scale + row, mask=is_row, other=0.0)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=is_row)


def unpack_expert(form: Form, parts: dict[str, Tensor], starts: Tensor | None, first: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
    """As `packed_experts.unpack`. starts, first: `row_starts` and `first_stored` with a mask."""
    kept = parts["codes" if form.bits else "values"]
    scale, zero = parts.get("scale", kept), parts.get("zero", kept)
    spans, width = (parts["scale"].shape[1], form.width) if form.bits else (1, form.columns)
    out = torch.empty(form.rows, form.columns, dtype=dtype, device=kept.device)
    if form.index == "mask":
        which = torch.full((1,), expert, dtype=torch.int32, device=kept.device)
        _mask_kernel[(triton.cdiv(form.rows, ROWS), 1)](
            kept, which, parts["mask"].view(torch.int32), starts, first, kept, scale, zero, out, form.rows, form.columns, form.columns // LANES, spans, width, 0,
            BITS=form.bits, ROWS=ROWS, UNROLL=UNROLL, LANES=LANES, MULTIPLY=False)
        return out
    _pattern_kernel[(form.rows, triton.cdiv(form.groups, GROUPS))](
        parts["words"][expert], kept[expert], scale, zero, _table(form, kept.device), out, form.columns, parts["words"].shape[-1],
        kept.shape[-1], spans, width, N=form.n, M=form.m, CHOICES=form.choices, DIGITS=form.digits, BITS=form.bits, GROUPS=GROUPS)
    return out


def multiply(form: Form, parts: dict[str, Tensor], starts: Tensor | None, first: Tensor | None, tokens_NC: Tensor, experts_N: Tensor) -> Tensor:
    """Every token times its expert's weight (N, R), summed in float32."""
    kept = parts["codes" if form.bits else "values"]
    scale, zero = parts.get("scale", kept), parts.get("zero", kept)
    spans, width = (parts["scale"].shape[1], form.width) if form.bits else (1, form.columns)
    out_NR = torch.empty(len(tokens_NC), form.rows, dtype=tokens_NC.dtype, device=kept.device)
    if form.index == "mask":
        tokens_NC = tokens_NC.contiguous()
        _mask_kernel[(triton.cdiv(form.rows, ROWS), len(tokens_NC))](
            tokens_NC, experts_N, parts["mask"].view(torch.int32), starts, first, kept, scale, zero, out_NR, form.rows, form.columns, form.columns // LANES, spans, width,
            tokens_NC.stride(0), BITS=form.bits, ROWS=ROWS, UNROLL=UNROLL, LANES=LANES, MULTIPLY=True)
        return out_NR
    words = parts["words"].shape[-1]
    padded = torch.nn.functional.pad(tokens_NC.float(), (0, 48 * words - form.columns))
    tokens = padded.view(-1, words, 48).transpose(1, 2).contiguous()
    _two_of_four_kernel[(triton.cdiv(form.rows, WORD_ROWS), len(tokens_NC))](
        tokens, experts_N, parts["words"], kept.view(torch.int32) if form.bits else kept, scale, zero, out_NR, form.rows, form.groups, words, spans, width,
        BITS=form.bits, ONE_SPAN=spans == 1, ROWS=WORD_ROWS, WORDS=WORDS)
    return out_NR


_tables: dict[tuple[int, int, torch.device], Tensor] = {}


def _table(form: Form, device: torch.device) -> Tensor:
    key = form.n, form.m, device
    if key not in _tables:
        _tables[key] = positions(form.n, form.m).to(device, torch.int32)
    return _tables[key]
