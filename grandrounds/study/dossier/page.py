"""The dossier as one HTML page that loads nothing, and carries its JSON inside.

Texts come from runs and are not trusted: Jinja2 escapes them, and the page's Content Security
Policy allows one style, by its hash, no script and no request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from grandrounds.study.dossier.lines import FORMAT, NOT_RECORDED
from grandrounds.study.report.page import content_hash

GENERATED = '<meta name="generator" content="grandrounds dossier">'
"""Near the beginning of every page: only files with this line are overwritten."""

INSIDE = re.compile(r'<script type="application/json" id="dossier">(.*?)</script>', re.DOTALL)
"""The JSON inside a page."""

COLLAPSED = ("packages",)
"""Sections that are long: closed on the screen, and printed only if they are opened."""

ROW = re.compile(r'<tr id="([^"]*)">(.*?)</tr>', re.DOTALL)
"""A line on a page: its id, and its cells."""


def html(content: Mapping[str, Any]) -> str:
    """Render a dossier's content, as its JSON has it: the same content gives the same page."""
    loader = PackageLoader("grandrounds.study.dossier", "templates")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    style = loader.get_source(jinja, "dossier.css")[0]
    titles = {section["key"]: section["title"] for section in content["sections"]}
    return jinja.get_template("dossier.html.j2").render(
        dossier=content,
        titles=titles,
        collapsed=COLLAPSED,
        missing=NOT_RECORDED,
        open_items=[item for item in content["guidelines"] if item["state"] == "open"],
        style=style,
        style_hash=content_hash(style),
        # in a script element only `<` could end it
        inside=json.dumps(content, ensure_ascii=True).replace("<", "\\u003c"),
    )


def content_inside(page: str) -> str:
    """Return the JSON inside a page; empty if there is none."""
    found = INSIDE.findall(page)
    return str(found[0]) if len(found) == 1 and FORMAT in found[0] else ""


def rows(page: str) -> dict[str, str]:
    """Return the lines of a page by id, as HTML."""
    return dict(ROW.findall(page))
