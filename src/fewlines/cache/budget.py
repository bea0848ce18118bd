"""How many image tokens may be resident, in the unit that the user thinks in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from fewlines.errors import FewlinesError

Unit = Literal["lines", "fraction", "tokens"]


@dataclass(frozen=True)
class Budget:
    """Image tokens that one head of one layer may hold, the prefix not counted.

    `lines: k` is `k·w` tokens, `fraction: ρ` is `round(ρ·N)`, `tokens: n` is `n`, on a grid of
    `h × w = N` tokens.
    """

    unit: Unit
    amount: Fraction

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            allowed = ", ".join(get_args(Unit))
            raise FewlinesError(f"budget: unknown unit '{self.unit}'; write one of {allowed}")
        if self.amount <= 0:
            raise FewlinesError(f"budget: {self} holds nothing; write an amount above 0")
        if self.unit == "fraction" and self.amount > 1:
            raise FewlinesError(f"budget: {self} is more than the image; write 1 or less")
        if self.unit == "tokens" and self.amount.denominator != 1:
            raise FewlinesError(f"budget: {self} is not a whole number of tokens")

    @classmethod
    def parse(cls, written: object) -> Budget:
        """From what a user writes: `{lines: 3}`, `{fraction: 1/6}` or `{tokens: 21}`."""
        if not isinstance(written, Mapping) or len(written) != 1:
            raise FewlinesError(
                f"budget: {written!r} is not one of {{lines: 3}}, {{fraction: 1/6}}, {{tokens: 21}}"
            )
        ((unit, amount),) = written.items()
        try:
            # A float such as 0.1 is meant as written, not as its nearest binary fraction.
            return cls(unit, Fraction(str(amount).replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise FewlinesError(f"budget: '{amount}' is not a number of {unit}") from None

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens on this grid, never above `N`; raises if not even one token fits."""
        height, width = grid
        scale = {"lines": width, "fraction": height * width, "tokens": 1}[self.unit]
        tokens = round(self.amount * scale)
        if tokens < 1:
            raise FewlinesError(f"budget: {self} is less than one token on a {height}×{width} grid")
        return min(tokens, height * width)

    @property
    def slug(self) -> str:
        """For file names: `3lines`, `1of6`, `21tokens`."""
        if self.unit == "fraction":
            return f"{self.amount.numerator}of{self.amount.denominator}"
        return f"{_decimal(self.amount)}{self.unit}"

    def __str__(self) -> str:
        amount = str(self.amount) if self.unit == "fraction" else _decimal(self.amount)
        return f"{self.unit}: {amount}"


def _decimal(amount: Fraction) -> str:
    return f"{float(amount):g}"
