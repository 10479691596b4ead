"""One HTML page of a run, several runs or a comparison, written to its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from grandrounds.errors import ConfigError

if TYPE_CHECKING:
    from grandrounds.study.report.figures import Page

PAGE = "report.html"

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Written:
    """A page and where it was written."""

    page: Page
    file: Path
    size_bytes: int
    warnings: Sequence[str]
    """What could not be read of damaged runs."""


def write_report(targets: Sequence[Path], out: Path | None = None) -> Written:
    """Write the page of one run, several runs or a comparison.

    Raises
    ------
    ConfigError
        If the place is a folder, jinja2 is not installed, or a comparison is not alone.
    DataError
        If the file cannot be written, or exists and is no report.
    RunDirectoryError
        If a target is no run.
    """
    file = (out or default_place(targets)).expanduser()
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder: give a file, such as {file / PAGE}.")
    if find_spec("jinja2") is None:
        raise ConfigError(
            'a report needs jinja2, which is not installed: pip install "jinja2>=3.1.6"'
        )
    warnings: list[str] = []
    page = _page_of(targets, warnings)
    from grandrounds.study.report.page import write_page

    return Written(page, file, write_page(page, file), warnings)


def default_place(targets: Sequence[Path]) -> Path:
    """Return the default output file."""
    if len(targets) > 1:
        return Path(PAGE)
    return (targets[0].parent if targets[0].suffix == ".json" else targets[0]) / PAGE


def _page_of(targets: Sequence[Path], warnings: list[str]) -> Page:
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
            warnings.append(f"{run.path} is damaged; not readable: {unread}")
    return run_page(runs[0]) if len(runs) == 1 else several_page(runs)
