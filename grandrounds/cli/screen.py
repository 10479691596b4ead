"""Tables, notes and progress of a command: Rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable


def _is_figure(cell: str) -> bool:
    """Say whether a cell begins as figures do, so that its column stands flush right."""
    return cell[:1] in tuple("0123456789+-<")


class Screen:
    """Rich on a terminal, plain lines elsewhere or where wanted."""

    def __init__(self, plain: bool) -> None:
        self._console = Console()
        self._rich = self._console.is_terminal and not plain

    def say(self, line: str) -> None:
        """Print one line as it is."""
        print(line, flush=True)

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
        self.say(title)
        for row in (columns, *rows):
            cells = [
                f"{cell:>{width}}" if is_right else f"{cell:<{width}}"
                for cell, width, is_right in zip(row, widths, numeric, strict=True)
            ]
            self.say("  " + "  ".join(cells).rstrip())

    def notes(self, lines: Sequence[str]) -> None:
        """Print what a reader must know."""
        for line in lines:
            if self._rich:
                self._console.print(f"[dim]- {escape(line)}[/dim]")
            else:
                self.say(f"- {line}")

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """Give a listener of `runner.evaluate`: a bar with the time left, or a line each."""
        if not self._rich:
            yield self._line
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        task = bar.add_task("loading", total=None)

        def listen(event: str, facts: Mapping[str, Any]) -> None:
            if event == "asking":
                what = escape(f"{facts['model']}  {facts['benchmark']}  {facts['protocol']}")
                bar.reset(task, total=facts["total"], completed=facts["done"], description=what)
            elif event == "answered":
                bar.advance(task, facts["count"])
            else:
                self._line(event, facts)

        with bar:
            yield listen

    def _line(self, event: str, facts: Mapping[str, Any]) -> None:
        """Print a line for each benchmark that is done."""
        if event != "asked":
            return
        cut = f", {facts['truncated']:,} prompts cut on the left" if facts["truncated"] else ""
        kept = f", {facts['done']:,} kept from before" if facts["done"] else ""
        line = (
            f"{facts['protocol']}  {facts['model']}  {facts['benchmark']}: "
            f"{facts['asked']:,} asked{kept}{cut}"
        )
        if self._rich:
            self._console.print(escape(line))
        else:
            self.say(line)
