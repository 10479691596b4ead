"""Tables of results as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grandrounds.config.words import shown
from grandrounds.study.tables import Table


def as_html(tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """Return tables and notes as HTML without styles or scripts, every text escaped."""
    return "\n".join([*map(_table, tables), *(f"<p>{_text(note)}</p>" for note in notes)])


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = (
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    title = f"<caption>{_text(table.title)}</caption>" * bool(table.title)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _text(text: str) -> str:
    return escape(shown(text))
