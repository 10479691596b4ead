"""The documentation site builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT


def test_every_page_has_a_place_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {page.stem for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_nobody(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [ROOT / "scripts" / "docs", site],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:[^\s\">]+)", text)
        links = re.findall(r"<link[^>]*\shref=\"?(https?:[^\s\">]+)", text)
        assert not [*loads, *links], page.name
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?:", style.read_text()), style.name
    assert "Train one adapter across all sites" in (site / "api-reference.html").read_text()
