"""Figures as files: SVG that stands alone, and PNG through a Chromium that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grandrounds.errors import DataError
from grandrounds.study.report.figures import Figure

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
"""Commands that are looked for, in this order."""

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
)
"""Options with which Chromium draws and asks nobody for anything: its own services still try, so
no name and no address is resolved. Without a sandbox it also runs as root and in containers; what
it is given to draw is our own file."""

PIXELS = 2
"""Pixels of a PNG for each unit of the figure."""

SECONDS = 120


def find_chromium() -> str | None:
    """Return the path of a Chromium; None if there is none."""
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


def standalone(svg: str, style: str) -> str:
    """Return a figure as a file by itself: its style inside, on white."""
    head, tag, rest = svg.partition(">")
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f"{head}{tag}<style>{style}</style>{ground}{rest}"


def write_figures(figures: Sequence[Figure], folder: Path, style: str) -> list[Path]:
    """Write every figure as `<key>.svg`; return the files.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            file = folder / f"{figure.key}.svg"
            file.write_text(standalone(figure.svg, style), encoding="utf-8")
            files.append(file)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another folder with "
            "--figures."
        ) from error
    return files


def size_of(svg: str) -> tuple[int, int]:
    """Return width and height of a figure, from its viewBox."""
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg)
    if found is None:
        raise DataError("this SVG is no figure of a report: it has no viewBox from 0 0")
    return int(found[1]), int(found[2])


def write_png(chromium: str, svg: Path) -> Path:
    """Draw an SVG file of `write_figures` as the PNG beside it.

    Raises
    ------
    DataError
        If Chromium fails, with what it said last.
    """
    width, height = size_of(svg.read_text(encoding="utf-8"))
    png = svg.with_suffix(".png")
    screenshot(chromium, svg, png, width, height, PIXELS)
    return png


def screenshot(
    chromium: str, page: Path, png: Path, width: int, height: int, pixels: int = 1
) -> None:
    """Write what a local page looks like in a window of so many CSS pixels.

    Raises
    ------
    DataError
        If Chromium fails, with what it said last.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            *QUIET,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={pixels}",
            f"--screenshot={png.absolute()}",
            page.absolute().as_uri(),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{chromium} could not draw {page}: {error}.") from error
    if done.returncode or not png.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DataError(f"{chromium} could not draw {page} (exit code {done.returncode}): {said}")
