"""Figures as files: standalone SVG, and PNG through an installed Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grandrounds import storage
from grandrounds.errors import DataError, first_line
from grandrounds.study.report.figures import Figure

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
"""Commands to look for, in this order."""

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
"""Options that let Chromium render without any network access: its own services still try, so no
host name is resolved. Without a sandbox it also runs as root and in containers; the file that it
renders is our own."""

PIXELS = 2
"""Pixels of a PNG per unit of the figure."""

SECONDS = 120


def find_chromium() -> str | None:
    """Return the path of a Chromium; None if there is none."""
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


def standalone(svg: str, style: str) -> str:
    """Return a figure as a standalone SVG with embedded CSS and a white background."""
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
    files = [folder / f"{figure.key}.svg" for figure in figures]
    with storage.writing(str(folder), "Choose another folder with --figures.", DataError):
        folder.mkdir(parents=True, exist_ok=True)
        for file, figure in zip(files, figures, strict=True):
            storage.write_text(file, standalone(figure.svg, style))
    return files


def size_of(svg: str) -> tuple[int, int]:
    """Return width and height of a figure, from its viewBox."""
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg)
    if found is None:
        raise DataError("this SVG is not a report figure: its viewBox must start at 0 0")
    return int(found[1]), int(found[2])


def write_png(chromium: str, svg: Path) -> Path:
    """Render an SVG file of `write_figures` as a PNG next to it.

    Raises
    ------
    DataError
        If Chromium fails, with its last line of output.
    """
    width, height = size_of(svg.read_text(encoding="utf-8"))
    png = svg.with_suffix(".png")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            *QUIET,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={PIXELS}",
            f"--screenshot={png.absolute()}",
            svg.absolute().as_uri(),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{chromium} could not render {svg}: {first_line(error)}.") from error
    if done.returncode or not png.is_file():
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"{chromium} could not render {svg} (exit code {done.returncode}): {said}")
    return png
