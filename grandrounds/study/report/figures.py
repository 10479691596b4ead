"""What a page is made of: figures, tables, tiles and sections; and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

NONE = "-"
"""What stands where there is nothing."""


@dataclass(frozen=True)
class Table:
    """Figures in words."""

    columns: tuple[str, ...]
    """The headings."""
    rows: Sequence[Sequence[str]]
    """As many cells as there are columns."""
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, what it says, and the same as a table."""

    key: str
    """Its file name, without an ending."""
    title: str
    svg: str
    """Markup in which every text is escaped."""
    note: str
    """How to read it."""
    table: Table


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    key: str
    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()
    """(what it does, a command to copy)."""

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.notes or self.figures or self.tables or self.commands)


@dataclass(frozen=True)
class Page:
    """A report, before it is HTML."""

    title: str
    subtitle: str
    mood: str
    """`good`, `going` or `bad`: how the status is marked."""
    status: str
    """In a few words."""
    story: Sequence[str]
    """What happened, where it is not all well."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    made: str = ""
    """By what, and when."""
    details: Sequence[str] = field(default=())
    """Single things that failed, one line each."""

    @property
    def figures(self) -> list[Figure]:
        """Return every figure of the page."""
        return [figure for section in self.sections for figure in section.figures]


# --- Numbers as text ------------------------------------------------------------------------------


def number(value: object, digits: int = 4) -> str:
    """Return a number with so many significant digits; `NONE` for anything else."""
    if not is_number(value):
        return NONE
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def fixed(value: object, decimals: int, sign: bool = False) -> str:
    """Return a number with so many decimals and no minus before a 0; `NONE` for anything else.

    `sign` sets a plus before what is above 0.
    """
    if not is_number(value):
        return NONE
    shown = round(float(value), decimals)
    return f"{shown:{'+' if sign and shown else ''}z,.{decimals}f}"


def decimals_of(values: Iterable[object], digits: int = 3, least: int = 0) -> int:
    """Return the decimals that give a column one form.

    They give the largest value so many significant digits; `least` at least, 8 at most.
    """
    largest = max((abs(v) for v in values if is_number(v)), default=0.0)
    needed = digits - 1 - math.floor(math.log10(largest)) if largest > 0 else 0
    return min(8, max(least, needed))


def percent(share: object, digits: int = 1) -> str:
    """Return a share from 0 to 1 as per cent."""
    if not is_number(share):
        return NONE
    return f"{100 * share:.{digits}f} %"


def percent_range(interval: Sequence[float] | None) -> str:
    """Return `34.3 to 45.3 %`."""
    if interval is None:
        return NONE
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def mib(value: object) -> str:
    """Return mebibytes."""
    if not is_number(value):
        return NONE
    return f"{value:,.2f} MiB" if abs(value) < 1000 else f"{value:,.0f} MiB"


def duration(seconds: object) -> str:
    """Return `47 s`, `12 min 5 s` or `3 h 20 min`."""
    if not is_number(seconds):
        return NONE
    whole = round(float(seconds))
    if whole < 60:
        return f"{float(seconds):.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
