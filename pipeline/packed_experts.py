"""How the experts of a linear are stored: which weights are kept, and their values or integer codes, without the zeros.

This file travels inside every saved model and needs torch alone. For E experts of R rows and C columns the parts are

    index "all"      nothing: every weight is kept
    index "mask"     mask (E, B) uint8: one bit a weight, row by row, the first in the lowest bit; B bytes are R C bits
                     starts (E + 1) int64: where each expert's values begin among all
    index "pattern"  words (E, R, W) int32: of every M consecutive columns N are kept, one of K = M! / (N! (M - N)!) choices in
                     lexicographic order; each unsigned word holds D = floor(32 / log2 K) choices as digits to the base K, the first the lowest
    values           the kept weights, row by row (mask: (V), all experts'; otherwise (E, R, kept columns)); or, with integer codes:
    codes            uint8: B bits a code, the first in the lowest bits (mask: every expert begins a new byte; otherwise every row)
    scale, zero      (R, G) float32 and uint8, shared by the experts, for groups of `width` columns: the weight is scale (code - zero)
"""

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

WORD = 32  # bits
LARGEST = 16  # M of patterns that are stored as such


@dataclass(frozen=True)
class Form:
    """index: "all", "mask" or "pattern" (n of m). bits: of a code; 0: values as they are. width: columns of a quantization group."""

    index: str
    experts: int
    rows: int
    columns: int
    n: int = 1
    m: int = 1
    bits: int = 0
    width: int = 0

    def to_dict(self) -> dict:
        return asdict(self)

    def is_sound(self) -> bool:
        """Does it make sense?"""
        whole = all(isinstance(number, int) for number in (self.experts, self.rows, self.columns, self.n, self.m, self.bits, self.width))
        if not whole or min(self.experts, self.rows, self.columns) < 1 or self.bits not in (0, 2, 3, 4, 5, 6, 7, 8) or not (0 < self.width <= self.columns if self.bits else self.width == 0):
            return False
        if self.index == "pattern":
            return 0 < self.n < self.m <= LARGEST and self.columns % self.m == 0
        return self.index in ("all", "mask") and (self.n, self.m) == (1, 1)

    @property
    def groups(self) -> int:
        """Groups of M columns."""
        return self.columns // self.m

    @property
    def choices(self) -> int:
        """K."""
        return math.comb(self.m, self.n)

    @property
    def digits(self) -> int:
        """D."""
        return digits_in_a_word(self.choices)

    @property
    def kept(self) -> int:
        """Columns kept of every row (not with a mask)."""
        return self.groups * self.n

    @property
    def row_bytes(self) -> int:
        return -(-self.kept * self.bits // 8)

    @property
    def mask_bytes(self) -> int:
        return -(-self.rows * self.columns // 8)

    def shapes(self, stored: int = 0) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype (None: the model's own) of every part. stored: with a mask, the length of `values` or `codes`."""
        parts: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
        flat = self.index == "mask"
        if flat:
            parts |= {"mask": ((self.experts, self.mask_bytes), torch.uint8), "starts": ((self.experts + 1,), torch.int64)}
        elif self.index == "pattern":
            parts["words"] = ((self.experts, self.rows, -(-self.groups // self.digits)), torch.int32)
        if self.bits:
            spans = (self.rows, -(-self.columns // self.width))
            parts |= {"codes": ((stored,) if flat else (self.experts, self.rows, self.row_bytes), torch.uint8),
                      "scale": (spans, torch.float32), "zero": (spans, torch.uint8)}
        else:
            parts["values"] = ((stored,) if flat else (self.experts, self.rows, self.kept), None)
        return parts


def digits_in_a_word(choices: int) -> int:
    digits = int(WORD / math.log2(choices)) if choices > 1 else WORD
    return digits + (choices ** (digits + 1) <= 1 << WORD) - (choices ** digits > 1 << WORD)  # the logarithm is rounded


@lru_cache
def positions(n: int, m: int) -> Tensor:
    """Columns kept (K, n) by each choice, int64."""
    return torch.tensor(list(combinations(range(m), n)))


# Reading one expert: a dense weight (R, C)


def unpack(form: Form, parts: dict[str, Tensor], expert: int, dtype: torch.dtype | None = None) -> Tensor:
    """One expert's weight (R, C), in `dtype` (None: that of its values; float32 for codes). Differentiable in the values.
    The parts must have passed `check`."""
    weight = _unpack_flat(form, parts, expert) if form.index == "mask" else _unpack_rows(form, parts, expert)
    return weight if dtype is None else weight.to(dtype)


def _unpack_flat(form: Form, parts: dict[str, Tensor], expert: int) -> Tensor:
    kept = bits_of(parts["mask"][expert])[:form.rows * form.columns].view(form.rows, form.columns).bool()
    first, last = parts["starts"][expert:expert + 2].tolist()
    if not form.bits:
        values = parts["values"][first:last]
        return torch.zeros(form.rows, form.columns, dtype=values.dtype, device=values.device).masked_scatter(kept, values)
    begin = code_bytes(parts["starts"], form.bits)[expert]
    codes = codes_of(parts["codes"][begin:begin + -(-(last - first) * form.bits // 8)], form.bits, last - first)
    whole = torch.zeros(form.rows, form.columns, dtype=torch.uint8, device=codes.device).masked_scatter(kept, codes)
    return dequantize(form, parts, whole).masked_fill_(~kept, 0)


def _unpack_rows(form: Form, parts: dict[str, Tensor], expert: int) -> Tensor:
    kept = codes_of(parts["codes"][expert], form.bits, form.kept) if form.bits else parts["values"][expert]
    if form.index == "all":
        return dequantize(form, parts, kept) if form.bits else kept
    columns = columns_of(form, parts["words"][expert])
    if form.bits:
        span = columns // form.width
        kept = parts["scale"].gather(1, span) * (kept.float() - parts["zero"].gather(1, span).float())
    return kept.new_zeros(form.rows, form.columns).scatter(1, columns, kept)


def columns_of(form: Form, words: Tensor) -> Tensor:
    """The kept columns (R, kept) of one expert with a pattern, int64."""
    left = words.long() & 0xFFFFFFFF
    digits = torch.empty(*words.shape, form.digits, dtype=torch.int64, device=words.device)
    for place in range(form.digits):
        digits[..., place] = left % form.choices
        left = left // form.choices
    chosen = digits.flatten(1)[:, :form.groups]
    first = torch.arange(0, form.columns, form.m, device=words.device)
    return (positions(form.n, form.m).to(words.device)[chosen] + first[None, :, None]).flatten(1)


def dequantize(form: Form, parts: dict[str, Tensor], codes: Tensor) -> Tensor:
    """Weights (R, C), float32, of codes for every column."""
    spread = lambda part: part.float().repeat_interleave(form.width, 1)[:, :form.columns]  # noqa: E731
    return spread(parts["scale"]) * (codes.float() - spread(parts["zero"]))


def bits_of(packed: Tensor) -> Tensor:
    """(..., B) bytes -> (8 B) bits as 0 and 1, uint8."""
    return (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten()


def codes_of(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of bytes (..., B), uint8."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)[..., :count]
    first = torch.arange(count, device=packed.device) * bits
    padded = torch.nn.functional.pad(packed, (0, 1))  # the last code may end with its byte
    pair = padded[..., first // 8].int() | padded[..., first // 8 + 1].int() << 8
    return (pair >> first % 8 & (1 << bits) - 1).to(torch.uint8)


def code_bytes(starts: Tensor, bits: int) -> list[int]:
    """Where each expert's codes begin, in bytes; and where the last one's end."""
    counts = starts.diff().tolist()
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + -(-count * bits // 8))
    return ends


# What is read is not to be trusted


def check(form: Form, parts: dict[str, Tensor], name: str) -> None:
    """Raises ValueError, naming the tensor, if any part would be read beyond its end or has no meaning. name: of the linear."""
    def demand(true: bool, part: str, what: str) -> None:
        if not true:
            raise ValueError(f"{name}.{part} is damaged: {what}")

    if not form.is_sound():
        raise ValueError(f"{name} is damaged: no experts are packed as {form}")
    flat, kept = form.index == "mask", "codes" if form.bits else "values"
    demand(kept in parts and parts[kept].dim() > 0, kept, "it is missing")
    stored = len(parts[kept]) if flat else 0
    for part, (shape, dtype) in form.shapes(stored).items():
        demand(part in parts, part, "it is missing")
        found = parts[part]
        demand(tuple(found.shape) == shape, part, f"its shape is {tuple(found.shape)}, {shape} was expected")
        demand(found.dtype == dtype or dtype is None and found.is_floating_point(), part, f"its dtype is {found.dtype}")
    if flat:
        starts, ones = parts["starts"], torch.stack([bits_of(mask).sum() for mask in parts["mask"]])
        demand(int(starts[0]) == 0 and bool((starts.diff() == ones).all()), "starts", "it does not count the bits of the mask")
        end = code_bytes(starts, form.bits)[-1] if form.bits else int(starts[-1])
        demand(end == stored, kept, f"its length is {stored}, {end} was expected")
        spare = 8 * form.mask_bytes - form.rows * form.columns
        demand(not spare or bool((parts["mask"][:, -1] >> 8 - spare == 0).all()), "mask", "bits beyond the last weight are set")
    if form.index == "pattern":
        words, last = parts["words"].long() & 0xFFFFFFFF, form.groups - (parts["words"].shape[-1] - 1) * form.digits
        demand(bool((words < form.choices**form.digits).all() and (words[..., -1] < form.choices**last).all()), "words", "a choice is out of range")
    if form.bits:
        demand(bool(parts["scale"].isfinite().all()), "scale", "a scale is not finite")
        demand(bool((parts["zero"].int() < 1 << form.bits).all()), "zero", "a zero point is beyond the last code")
