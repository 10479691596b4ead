"""A page as one HTML file that loads nothing: style, script and figures stand in it.

Texts come from runs and are not trusted. Jinja2 escapes them, and the page's own Content Security
Policy admits one style and one script, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from grandrounds.errors import DataError
from grandrounds.study.report.figures import NONE, Page, Table

GENERATED = '<meta name="generator" content="grandrounds report">'
"""What every page has near its beginning: only such a file is written over."""

PACKAGE = "grandrounds.study.report"


def environment() -> Environment:
    """Return Jinja2 with autoescape, which also finds the templates of an installed wheel."""
    made = Environment(
        loader=PackageLoader(PACKAGE, "templates"), autoescape=True, undefined=StrictUndefined
    )
    made.globals["numeric"] = numeric_columns
    return made


def template(name: str) -> str:
    """Return a file of templates/ as it is."""
    loader = PackageLoader(PACKAGE, "templates")
    return loader.get_source(Environment(autoescape=True), name)[0]


def html(page: Page) -> str:
    """Return the page."""
    style = template("figures.css") + template("page.css")
    script = template("page.js")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            style=style,
            script=script,
            style_hash=content_hash(style),
            script_hash=content_hash(script),
        )
    )


def content_hash(text: str) -> str:
    """Return SHA-256 as a Content Security Policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def numeric_columns(table: Table) -> set[int]:
    """Return the columns in which every cell begins as figures do."""
    if not table.rows:
        return set()
    columns = zip(*table.rows, strict=True)
    return {
        i
        for i, cells in enumerate(columns)
        if all(c == NONE or c[:1] in tuple("0123456789+-") for c in cells)
        and max(map(len, cells)) <= 32
    }


def write_page(page: Page, file: Path) -> int:
    """Write the page, whole or not at all; return its bytes.

    Raises
    ------
    DataError
        If the file cannot be written, or is there and was not made by this command.
    """
    content = html(page).encode()
    partial = file.with_name(f".{file.name}.partial")
    try:
        if file.exists() and GENERATED.encode() not in file.read_bytes()[:2000]:
            raise DataError(
                f"{file} is there and is no report of grandrounds: it is not written over. "
                "Choose another place with --out."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise DataError(
            f"{file} cannot be written: {error.strerror or error}. Choose another place with --out."
        ) from error
    return len(content)
