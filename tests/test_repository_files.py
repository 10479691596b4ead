"""Files that a hosting service or an indexer reads are valid, and name what exists."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.places import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_issue_forms_have_what_their_schema_requires(file: Any) -> None:
    form = yaml.safe_load(file.read_text())
    if file.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert form.keys() >= {"name", "description", "body"}
    named = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert named
    assert len(named) == len(set(named))
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        needed = {"markdown": "value", "dropdown": "options", "checkboxes": "options"}
        assert {needed.get(part["type"], "label")} <= part["attributes"].keys()


def test_the_citation_file_names_the_version_and_licence_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    for key in ("version", "license"):
        [value] = re.findall(rf'^{key} = "(.+)"$', project, re.MULTILINE)
        assert str(cited[key]) == value


def test_the_pull_request_template_names_the_scripts_that_exist() -> None:
    text = (ROOT / ".github" / "pull_request_template.md").read_text()
    named = re.findall(r"scripts/\w+", text)
    assert named
    assert all((ROOT / name).is_file() for name in named)
