"""Renders a page as one HTML file that loads nothing: style, script and figures are inside it.

Texts come from runs and are not trusted. Jinja2 escapes them, and the page's own Content Security
Policy allows one style and one script, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import grandrounds
from grandrounds import storage
from grandrounds.errors import DataError
from grandrounds.study.report.figures import Page
from grandrounds.study.tables import NONE, Table

GENERATED = '<meta name="generator" content="grandrounds report">'
"""Near the beginning of every page: only files with this line are overwritten."""

LOADER = PackageLoader("grandrounds.study.report", "templates")


def template(name: str) -> str:
    """Return a file of templates/ unchanged."""
    return LOADER.get_source(Environment(autoescape=True), name)[0]


def html(page: Page) -> str:
    """Render the page."""
    jinja = Environment(loader=LOADER, autoescape=True, undefined=StrictUndefined)
    jinja.globals["numeric"] = numeric_columns
    style = template("figures.css") + template("page.css")
    script = template("page.js")
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return jinja.get_template("page.html.j2").render(
        page=page,
        sections=[section for section in page.sections if section],
        made=f"Made by grandrounds {grandrounds.__version__}, {now}.",
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
    )


def content_hash(text: str) -> str:
    """Return SHA-256 in the notation of a Content Security Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def numeric_columns(table: Table) -> set[int]:
    """Return the indices of the columns whose cells all begin like a number."""
    columns = zip(*table.rows, strict=True)
    return {
        i
        for i, cells in enumerate(columns)
        if all(c == NONE or c[:1] in tuple("0123456789+-<") for c in cells)
        and max(map(len, cells)) <= 32
    }


def write_page(page: Page, file: Path) -> int:
    """Write the page; return its size in bytes.

    Raises
    ------
    DataError
        If the file cannot be written, or exists and was not made by this command.
    """
    content = html(page).encode(errors="backslashreplace")  # a folder's name may be no UTF-8
    with storage.writing(str(file), "Choose another place with --out.", DataError):
        if file.exists() and GENERATED.encode() not in file.read_bytes()[:2000]:
            raise DataError(
                f"{file} exists and is not a report of grandrounds, so it is not overwritten. "
                "Choose another place with --out."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(file, content)
    return len(content)
