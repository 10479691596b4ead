"""A consortium and a site, set up and not yet joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from grandrounds.engines.deployment import set_up


@pytest.fixture
def consortium(tmp_path: Path) -> Path:
    return set_up.init_consortium(tmp_path / "consortium", "trial", "trial.example.org", 8000)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = set_up.init_site(tmp_path / "site", "st-elsewhere")
    text = (folder / "site.toml").read_text()
    text = set_up.with_value(text, "data", "source", "cards.csv")
    (folder / "site.toml").write_text(f'{text}\n[bases.formulary]\npath = ""\n')
    return folder
