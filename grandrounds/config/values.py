"""Allowed values of a configuration key: a range, one value of a list, or several."""

from __future__ import annotations

import datetime
import json
import re
import sys
from dataclasses import dataclass
from math import inf

from grandrounds.config.expressions import MOST_WAYS, ways

Scalar = bool | int | float | str

AUTO = "auto"
"""The value of a key that is settled by other keys or by the machine."""

ENDLESS = sys.float_info.max
"""Upper end of a range that has none."""


@dataclass(frozen=True)
class Range:
    """Numbers with `low <= value <= high`; `low` itself is excluded if `above`."""

    low: float
    high: float = ENDLESS
    above: bool = False
    auto: bool = False
    """Whether a recipe may also say `auto`, which is replaced before a value is checked."""

    def admits(self, value: float) -> bool:
        """Whether `value` is a number within the range."""
        over = value > self.low if self.above else value >= self.low
        return over and value <= self.high

    def __str__(self) -> str:
        low, high = (
            str(int(v)) if float(v).is_integer() else f"{v:g}" for v in (self.low, self.high)
        )
        left = f"more than {low}" if self.above else f"at least {low}"
        text = left if self.high == ENDLESS else f"{left}, at most {high}"
        return f"{text}, or '{AUTO}'" if self.auto else text


@dataclass(frozen=True)
class OneOf:
    """One of the listed values."""

    values: tuple[Scalar, ...]

    def admits(self, value: Scalar) -> bool:
        """Whether `value` is listed; `True` is not 1."""
        return any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
        )

    def __str__(self) -> str:
        if len(self.values) == 1:
            return repr(self.values[0]) if self.values[0] != "" else "empty"
        return "one of " + ", ".join(repr(v) for v in self.values)


@dataclass(frozen=True)
class SomeOf(OneOf):
    """One or more of the listed values, comma-separated; `none` only alone."""

    def admits(self, value: Scalar) -> bool:
        """Whether all items are allowed and unique, with `none` only on its own."""
        words = words_of(value)
        alone = len(words) == 1 or (len(set(words)) == len(words) and "none" not in words)
        return bool(words) and alone and set(words) <= set(self.values)

    def __str__(self) -> str:
        return "one or more of " + ", ".join(repr(v) for v in self.values) + ", comma-separated"


@dataclass(frozen=True)
class Day:
    """A date as YYYY-MM-DD, or an empty string."""

    def admits(self, value: str) -> bool:
        """Whether a text is a date of the calendar, written in full, or empty."""
        if not value:
            return True
        try:
            return datetime.date.fromisoformat(value).isoformat() == value
        except ValueError:
            return False

    def __str__(self) -> str:
        return "a date such as 2026-07-26, or empty"


@dataclass(frozen=True)
class Weights:
    """One or more numbers from 0 to 1, comma-separated."""

    def admits(self, value: str) -> bool:
        """Whether all items are numbers from 0 to 1, and there is one."""
        try:
            numbers = [float(word) for word in words_of(value)]
        except ValueError:
            return False
        return 0 < len(numbers) <= MOST_WEIGHTS and all(0 <= number <= 1 for number in numbers)

    def __str__(self) -> str:
        return f"one to {MOST_WEIGHTS} numbers from 0 to 1, comma-separated"


MOST_WEIGHTS = 20
"""Weights in a list: each is an evaluation."""


@dataclass(frozen=True)
class Sha256:
    """A SHA-256 in hex digits, or an empty string."""

    def admits(self, value: str) -> bool:
        """Whether a text is 64 small hex digits, or empty."""
        return not value or re.fullmatch("[0-9a-f]{64}", value) is not None

    def __str__(self) -> str:
        return "a SHA-256 of 64 hex digits, or empty"


@dataclass(frozen=True)
class Table:
    """A table of scalars as a JSON object, or an empty string."""

    def admits(self, value: str) -> bool:
        """Whether a text is a JSON object of strings, finite numbers and booleans, or empty."""
        try:
            table = json.loads(value or "{}")
        except ValueError:
            return False
        return isinstance(table, dict) and all(
            name.isidentifier()
            and isinstance(one, Scalar)
            and one not in (inf, -inf)
            and one == one
            for name, one in table.items()
        )

    def __str__(self) -> str:
        return "a table of strings, numbers and booleans, such as {enable_thinking = false}"


@dataclass(frozen=True)
class Patterns:
    """A table of module names, as regular expressions, with numbers: JSON, or an empty string."""

    numbers: Range
    """What a number may be."""
    whole: bool
    """Whether it must be an integer."""

    def admits(self, value: str) -> bool:
        """Whether a text is a JSON object of expressions and allowed numbers, or empty."""
        try:
            table = json.loads(value or "{}")
            for pattern in table if isinstance(table, dict) else ():
                re.compile(rf"(.*\.)?({pattern})$")  # as PEFT writes it
        except (ValueError, re.error):
            return False
        kinds = (int,) if self.whole else (int, float)
        return (
            isinstance(table, dict)
            and sum(map(ways, table)) <= MOST_WAYS
            and all(
                pattern and type(number) in kinds and self.numbers.admits(number)
                for pattern, number in table.items()
            )
        )

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        return (
            "a table of names of modules, or regular expressions of them, each with "
            f"{kind} ({self.numbers}), such as {{q_proj = 4}}; an expression repeats characters "
            "only, no groups, and about three times at most"
        )


def words_of(value: Scalar) -> tuple[str, ...]:
    """Return the items of a comma-separated list."""
    return tuple(word.strip() for word in str(value).split(",") if word.strip())
