"""What a key of the configuration allows: a range, one value of a list, or several."""

from __future__ import annotations

import sys
from dataclasses import dataclass

Scalar = bool | int | float | str

ENDLESS = sys.float_info.max
"""The highest value of a key that names none."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key allows: `low <= value <= high`, without `low` itself if `above`."""

    low: float
    high: float = ENDLESS
    above: bool = False

    def admits(self, value: float) -> bool:
        """Whether `value` is a number within the range."""
        over = value > self.low if self.above else value >= self.low
        return over and value <= self.high

    def __str__(self) -> str:
        low, high = (
            str(int(v)) if float(v).is_integer() else f"{v:g}" for v in (self.low, self.high)
        )
        left = f"more than {low}" if self.above else f"at least {low}"
        return left if self.high == ENDLESS else f"{left}, at most {high}"


@dataclass(frozen=True)
class OneOf:
    """The values that a key allows, listed."""

    values: tuple[Scalar, ...]

    def admits(self, value: Scalar) -> bool:
        """Whether `value` is in the list, as the same type."""
        return any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
        )

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(v) for v in self.values)


@dataclass(frozen=True)
class SomeOf(OneOf):
    """One or several of the values that a key allows, in one text with commas; `none` alone."""

    def admits(self, value: Scalar) -> bool:
        """Whether every word of `value` is in the list, and none stands twice."""
        words = words_of(value)
        alone = len(words) == 1 or (len(set(words)) == len(words) and "none" not in words)
        return bool(words) and alone and set(words) <= set(self.values)

    def __str__(self) -> str:
        return "one or several of " + ", ".join(repr(v) for v in self.values) + ", with commas"


def words_of(value: Scalar) -> tuple[str, ...]:
    """Return the words of a text with commas."""
    return tuple(word.strip() for word in str(value).split(",") if word.strip())
