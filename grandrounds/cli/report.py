"""`grandrounds report`: one HTML page for a run, several runs, or a comparison."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grandrounds.cli.screen import say
from grandrounds.study.report.written import write_report

if TYPE_CHECKING:
    from grandrounds.study.report.figures import Page


def report(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR|COMPARISON...",
            help="Run directory, several of them to show side by side, or a comparison's folder "
            "or comparison.json.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file; default: `report.html` in the run or comparison, for several runs "
            "in the current folder.",
            metavar="FILE",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Output folder for the figures as SVG and, if Chromium is installed, as PNG.",
            metavar="DIR",
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Render one or more runs, or a comparison, as a self-contained HTML page.

    Works for completed, failed and running runs.

    Examples:

    - `grandrounds report runs/first --open`

    - `grandrounds report runs/first --figures runs/first/figures`

    - `grandrounds report runs/first runs/second runs/third --out three.html`

    - `grandrounds report comparisons/wards`
    """
    written = write_report(targets, out)
    page, file = written.page, written.file
    for warning in written.warnings:
        say(f"warning: {warning}")
    say(f"written: {file} ({written.size_bytes / 1000:,.0f} kB, {len(page.figures)} figures)")
    if figures is not None:
        _write_figures(page, figures.expanduser())
    if open_page and not webbrowser.open(file.absolute().as_uri()):
        say(f"--open: no browser found; open {file.absolute()} in one.")


def _write_figures(page: Page, folder: Path) -> None:
    """Write SVG files, then PNG files if Chromium is installed."""
    from grandrounds.study.report.browser import CHROMIUMS, find_chromium, write_figures, write_png
    from grandrounds.study.report.page import template

    files = write_figures(page.figures, folder, template("figures.css"))
    say(f"written: {len(files)} SVG files in {folder}")
    chromium = find_chromium()
    if chromium is None:
        say(
            f"no PNG files: they need Chromium, and none of {', '.join(CHROMIUMS)} is on PATH. "
            "Install it (Debian: apt install chromium), or use the SVG files."
        )
        return
    for file in files:
        write_png(chromium, file)
    say(f"written: {len(files)} PNG files in {folder}, rendered by {chromium}")
