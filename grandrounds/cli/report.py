"""`grandrounds report`: one HTML page for a run, several runs, or a comparison."""

from __future__ import annotations

import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grandrounds.cli.screen import say
from grandrounds.errors import ConfigError

if TYPE_CHECKING:
    from grandrounds.study.report.figures import Page

PAGE = "report.html"

COMPARISON = "comparison.json"


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
    file = (out or default_place(targets)).expanduser()
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder: give a file, such as {file / PAGE}.")
    if find_spec("jinja2") is None:
        raise ConfigError(
            'a report needs jinja2, which is not installed: pip install "jinja2>=3.1"'
        )
    page = page_of(targets)
    from grandrounds.study.report.page import write_page

    size_bytes = write_page(page, file)
    say(f"written: {file} ({size_bytes / 1000:,.0f} kB, {len(page.figures)} figures)")
    if figures is not None:
        _write_figures(page, figures.expanduser())
    if open_page and not webbrowser.open(file.absolute().as_uri()):
        say(f"--open: no browser found; open {file.absolute()} in one.")


def default_place(targets: list[Path]) -> Path:
    """Return the default output file."""
    if len(targets) > 1:
        return Path(PAGE)
    return (targets[0].parent if targets[0].suffix == ".json" else targets[0]) / PAGE


def page_of(targets: list[Path]) -> Page:
    """Return the page of one run, several runs or a comparison."""
    from grandrounds.study.report.comparison_file import read_comparison
    from grandrounds.study.report.comparison_page import comparison_page
    from grandrounds.study.report.one_run import run_page
    from grandrounds.study.report.read import read_run
    from grandrounds.study.report.several_runs import several_page

    compared = [t for t in targets if t.suffix == ".json" or (t / COMPARISON).is_file()]
    if compared and len(targets) > 1:
        raise ConfigError(
            f"{compared[0]} is a comparison, which has its own page: give it alone, or give "
            "run directories only."
        )
    if compared:
        file = targets[0] if targets[0].suffix == ".json" else targets[0] / COMPARISON
        return comparison_page(read_comparison(file), file)
    runs = [read_run(target) for target in targets]
    for run in runs:
        for unread in run.unread:
            say(f"warning: {run.path} is damaged; not readable: {unread}")
    return run_page(runs[0]) if len(runs) == 1 else several_page(runs)


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
