"""Output of a command: boxed tables and progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Table as RichTable


def say(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        print(line, flush=True)


def _is_figure(cell: str) -> bool:
    """Return whether a cell starts like a number, so that its column is right-aligned."""
    return cell[:1] in tuple("0123456789+-<")


class Screen:
    """Rich output on a terminal, plain lines elsewhere or on request."""

    def __init__(self, plain: bool) -> None:
        self._console = Console()
        self._rich = self._console.is_terminal and not plain

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: boxed on a terminal, else aligned columns under a title."""
        numeric = [all(map(_is_figure, cells)) for cells in zip(*rows, strict=True)]
        if self._rich:
            drawn = RichTable(title=escape(title), title_justify="left")
            for column, is_right in zip(columns, numeric, strict=True):
                justify: Literal["left", "right"] = "right" if is_right else "left"
                drawn.add_column(escape(column), overflow="fold", justify=justify)
            for row in rows:
                drawn.add_row(*map(escape, row))
            self._console.print(drawn)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        say(title)
        for row in (columns, *rows):
            cells = [
                f"{cell:>{width}}" if is_right else f"{cell:<{width}}"
                for cell, width, is_right in zip(row, widths, numeric, strict=True)
            ]
            say("  " + "  ".join(cells).rstrip())

    def notes(self, lines: Sequence[str]) -> None:
        """Print what a reader of the tables must know."""
        for line in lines:
            if self._rich:
                self._console.print(f"[dim]- {escape(line)}[/dim]")
            else:
                say(f"- {line}")

    @contextmanager
    def bar(
        self, description: str, *columns: ProgressColumn, **fields: Any
    ) -> Iterator[tuple[Progress, TaskID]]:
        """Yield a progress bar and its task; the bar is shown on a terminal only."""
        text = TextColumn("{task.description}")
        bar = Progress(
            text, BarColumn(bar_width=24), *columns, console=self._console, transient=True
        )
        with bar if self._rich else nullcontext():
            yield bar, bar.add_task(description, total=None, **fields)
