"""The parts of a page: figures, tiles, sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grandrounds.study.tables import Table


@dataclass(frozen=True)
class Figure:
    """A chart, how to read it, and its data as a table."""

    key: str
    """File name without suffix."""
    title: str
    svg: str
    """Markup; every text in it is escaped."""
    note: str
    """How to read it."""
    table: Table


def some(*figures: Figure | None) -> list[Figure]:
    """Return the figures that are not None."""
    return [figure for figure in figures if figure is not None]


@dataclass(frozen=True)
class Tile:
    """One value of the headline."""

    name: str
    value: str
    note: str = ""
    mood: str = ""
    """`bad` for a loss, such as forgetting; empty otherwise."""


@dataclass(frozen=True)
class Section:
    """A section of a page; one without content is left out."""

    key: str
    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()
    """(description, command to copy)."""

    def __bool__(self) -> bool:
        """Whether it has any content."""
        return bool(self.notes or self.figures or self.tables or self.commands)


@dataclass(frozen=True)
class Page:
    """A report before it is rendered as HTML."""

    title: str
    subtitle: str
    mood: str
    """`good`, `going` or `bad`: how the status is marked."""
    status: str
    """In a few words."""
    story: Sequence[str]
    """What went wrong or is not finished, and what to do."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    outcome: str = ""
    """What came out, in one sentence."""
    failures: Sequence[str] = ()
    """Single failures, one line each."""

    @property
    def figures(self) -> list[Figure]:
        """All figures of the page."""
        return [figure for section in self.sections for figure in section.figures]
