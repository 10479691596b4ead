"""Output of a command: boxes, a spinner and bars on a terminal, plain lines elsewhere.

A terminal shows everything that a pipe shows, and moving parts below it. Results go to standard
output; with `--json` that is one JSON document, and everything else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.status import Status

from grandrounds.config.words import shown
from grandrounds.errors import ConfigError
from grandrounds.server.listeners import boxes

REFRESHES_PER_SECOND = 8
"""Redraws of a spinner or bar: enough to be seen moving, too few to be felt beside training."""


_lifetimes: list[ExitStack] = []


@contextmanager
def lifetime() -> Iterator[None]:
    """Undo meanwhile what screens change: the spinner, and where standard output goes."""
    with ExitStack() as stack:
        _lifetimes.append(stack)
        try:
            yield
        finally:
            _lifetimes.remove(stack)


def say(*lines: str) -> None:
    """Print lines, control characters escaped: part of a line may be somebody else's."""
    for line in lines:
        print("\n".join(map(shown, line.split("\n"))), flush=True)


def draws(console: Console, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a console can be drawn on: a terminal that moves its cursor, and no CI.

    `TERM=dumb` and a set `CI` ask for plain lines; `FORCE_COLOR` overrides both, as in Rich, and
    `NO_COLOR` leaves boxes and bars without colours.
    """
    given = os.environ if environment is None else environment
    if given.get("FORCE_COLOR"):
        return console.is_terminal
    in_ci = given.get("CI", "").lower() not in ("", "0", "false")
    return console.is_terminal and not console.is_dumb_terminal and not in_ci


def _is_figure(cell: str) -> bool:
    """Return whether a cell starts like a number, so that its column is right-aligned."""
    return cell[:1] in tuple("0123456789+-<")


class Screen:
    """The output of one command: Rich on a terminal, plain lines elsewhere or on request."""

    def __init__(
        self, plain: bool, *, verbose: bool = False, quiet: bool = False, as_json: bool = False
    ) -> None:
        """Set up the output of a command, until its `lifetime` ends.

        Raises
        ------
        ConfigError
            If the output is to be both verbose and quiet.
        """
        if verbose and quiet:
            raise ConfigError("--verbose and --quiet exclude each other: give one of them")
        self.verbose, self.quiet, self.as_json = verbose, quiet, as_json
        self._document = sys.stdout
        if as_json and _lifetimes:
            _lifetimes[-1].enter_context(redirect_stdout(sys.stderr))
        self.console = Console()  # which looks up sys.stdout at each use
        self.is_rich = draws(self.console) and not plain
        self._status: Status | None = None
        if _lifetimes:
            _lifetimes[-1].callback(self.still)

    def working(self, what: str) -> None:
        """Show a spinner until the next output of this screen, or the end of the command."""
        if not self.is_rich or self.quiet:
            return
        if self._status is None:
            self._status = Status(
                what, console=self.console, refresh_per_second=REFRESHES_PER_SECOND
            )
            self._status.start()
        else:
            self._status.update(what)

    def still(self) -> None:
        """End the spinner."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def emit(self, content: Any) -> None:
        """Print the command's result as the one JSON document, if that is wanted."""
        self.still()
        if self.as_json:
            print(json.dumps(content, indent=2), file=self._document, flush=True)

    def tell(self, *lines: str) -> None:
        """Print lines about the progress, unless the output is quiet."""
        if not self.quiet:
            say(*lines)

    def detail(self, *lines: str) -> None:
        """Print lines that only a verbose output has."""
        if self.verbose:
            say(*lines)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: drawn on a terminal, else aligned columns under a title."""
        self.still()
        numeric = [all(map(_is_figure, cells)) for cells in zip(*rows, strict=True)]
        if self.is_rich:
            boxes.draw(self.console, title, columns, rows, numeric)
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
        """Print what a reader of the tables must know, unless the output is quiet."""
        self.still()
        for line in lines if not self.quiet else ():
            if self.is_rich:
                self.console.print(f"[dim]- {escape(line)}[/dim]")
            else:
                say(f"- {line}")

    @contextmanager
    def bar(
        self, description: str, *columns: ProgressColumn, **fields: Any
    ) -> Iterator[tuple[Progress, TaskID]]:
        """Yield a progress bar and its task; the bar is shown on a terminal only."""
        self.still()
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=self.console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        with bar if self.is_rich and not self.quiet else nullcontext():
            yield bar, bar.add_task(description, total=None, **fields)
