"""Sparsity patterns as a user writes them: a fraction, or N:M. Nothing here needs torch."""

import re
from dataclasses import dataclass

ALLOWED = "a fraction from 0 up to but not including 1 (such as 0.5), or N:M with 0 < N < M <= 128, N kept of every M (such as 2:4)"


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: either a `fraction` of weights pruned, or `n` kept of every `m` consecutive columns."""

    fraction: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str | float) -> "Pattern":
        """Read `0.5`, `2:4` or `(2, 4)`. Raises ValueError with what is allowed."""
        text = str(text).strip()
        pair = re.fullmatch(r"(\d+)\s*:\s*(\d+)|\(\s*(\d+)\s*,\s*(\d+)\s*\)", text)
        if pair:
            n, m = (int(number) for number in pair.groups() if number is not None)
            if not 0 < n < m <= 128:
                raise ValueError(ALLOWED)
            return cls(fraction=1 - n / m, n=n, m=m)
        try:
            fraction = float(text)
        except ValueError:
            raise ValueError(ALLOWED) from None
        if not 0 <= fraction < 1:
            raise ValueError(ALLOWED)
        return cls(fraction=fraction)

    @property
    def is_n_of_m(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_n_of_m else f"{self.fraction:g}"
