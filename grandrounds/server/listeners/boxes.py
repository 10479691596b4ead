"""Tables on a terminal: boxed where a box breaks no word or number, else a line a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def draw(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    is_right: Sequence[bool] = (),
) -> None:
    """Print a table on a terminal.

    Parameters
    ----------
    columns
        Headings; an empty sequence shows none.
    is_right
        Whether each column is aligned to the right; default: none.
    """
    if not fits(columns, rows, console.width):
        console.print(title, style="italic", markup=False, highlight=False)
        for line in listed(columns, rows):
            console.print(escape(line), soft_wrap=True, highlight=False)
        return
    drawn = Table(title=escape(title), title_justify="left", show_header=bool(columns))
    aligned = [*is_right, *(False for _ in (columns or rows[0])[len(is_right) :])]
    for heading, right in zip(columns or ("" for _ in rows[0]), aligned, strict=True):
        justify: Literal["left", "right"] = "right" if right else "left"
        drawn.add_column(escape(heading), overflow="fold", justify=justify)
    for row in rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Return whether a box of a width, in cells, holds the longest word of every column.

    A border and two spaces stand beside each column.
    """
    grid = [columns, *rows] if columns else rows
    longest = [
        max(cell_len(word) for cell in cells for word in cell.split() or [""])
        for cells in zip(*grid, strict=True)
    ]
    return sum(longest) + 3 * len(longest) + 1 <= width


def listed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines: the first cell of a row, and below it the others by heading."""
    lines = []
    for first, *others in rows:
        lines.append(f"  {first}")
        named = columns[1:] or ["" for _ in others]
        lines += [
            f"    {f'{name}  ' * bool(name)}{c}" for name, c in zip(named, others, strict=True)
        ]
    return lines
