"""Tables of text, for the terminal and for pages, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from grandrounds.config import words

NONE = "-"
"""An empty cell, or a value that is not known."""

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    columns: Sequence[str]
    """Column headings."""
    rows: Sequence[Sequence[str]]
    """One cell per column."""
    title: str = ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object, digits: int = 4) -> str:
    """Format to `digits` significant digits; `NONE` if the value is not a number."""
    if not is_number(value):
        return NONE
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def fixed(value: object, decimals: int, sign: bool = False) -> str:
    """Format to `decimals` decimals, never as minus zero; `NONE` if the value is not a number.

    With `sign`, positive values get a plus.
    """
    if not is_number(value):
        return NONE
    shown = round(float(value), decimals)
    return f"{shown:{'+' if sign and shown else ''}z,.{decimals}f}"


def decimals_of(values: Iterable[object], digits: int = 3, least: int = 0) -> int:
    """Return the number of decimals to use for a whole column.

    The largest value gets `digits` significant digits; the result lies between `least` and 8.
    """
    largest = max((abs(v) for v in values if is_number(v)), default=0.0)
    needed = digits - 1 - math.floor(math.log10(largest)) if largest > 0 else 0
    return min(8, max(least, needed))


def in_percent(share: float) -> str:
    """Format a share as a percentage, without the percent sign."""
    return fixed(100 * share, 1)


def percent(share: object, decimals: int = 1) -> str:
    """Format a share as a percentage."""
    return words.percent(share, decimals) if is_number(share) else NONE


def points(difference: float) -> str:
    """Format a difference of two shares in percentage points, signed."""
    return fixed(100 * difference, 1, sign=True)


def interval(bounds: Sequence[float]) -> str:
    """Format an interval of a share: `34.3 to 45.3`, in percent."""
    return " to ".join(map(in_percent, bounds))


def p_text(p: object) -> str:
    """Format a p-value to three decimals, never as 0; `NONE` if there is none."""
    if not is_number(p):
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_mib(num_bytes: float) -> str:
    """Format bytes in MiB, without the unit."""
    return f"{num_bytes / MIB:,.2f}"


def in_gib(num_bytes: float) -> str:
    """Format bytes in GiB, without the unit."""
    return f"{num_bytes / GIB:,.2f}"


def mib(value: object) -> str:
    """Format a value that is in MiB already, with the unit."""
    if not is_number(value):
        return NONE
    return f"{value:,.2f} MiB" if abs(value) < 1000 else f"{value:,.0f} MiB"


def duration(seconds: object) -> str:
    """Format as `47.0 s`, `12 min 5 s` or `3 h 20 min`."""
    if not is_number(seconds):
        return NONE
    whole = round(float(seconds))
    if whole < 60:
        return f"{float(seconds):.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
