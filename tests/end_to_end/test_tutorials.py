"""Tutorials and notebook are run as they stand; what is not run is marked with its reason."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config.bases import FOLDER_VARIABLE
from tests.places import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def tutorials() -> dict[str, Any]:
    """Return the names of scripts/tutorials.py."""
    return runpy.run_path(str(ROOT / "scripts" / "tutorials.py"))


def script(name: str, *words: str, bases: Path) -> str:
    """Run a script where no base was fetched; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *words],
        env={**os.environ, FOLDER_VARIABLE: str(bases), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_of_a_tutorial_is_seen_and_what_is_not_run_has_a_reason(
    tutorials: dict[str, Any],
) -> None:
    for page in tutorials["TUTORIALS"]:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        blocks = tutorials["blocks_of"](page)
        assert len(blocks) == len(re.findall(r"^```(?:bash|python)$", text, re.MULTILINE))
        marked = [block for block in blocks if block.not_run or block.base]
        assert len(marked) == len(re.findall(r"^<!-- (?:not run|with the base)", text, re.M))
        assert len(marked) < len(blocks)
    entry = tutorials["blocks_of"]("leaderboard-entry")
    assert [block.not_run for block in entry if "push" in block.code] == ["it needs the run above"]


@pytest.mark.slow
def test_an_entry_is_planned_and_rehearsed_and_a_base_that_is_not_here_is_counted(
    tmp_path: Path,
) -> None:
    """The first run's page is played command by command in test_docs.py."""
    said = script("tutorials.py", "leaderboard-entry", "own-data", bases=tmp_path)
    assert "completed after 2 rounds" in said
    assert said.splitlines()[-2:] == [
        "leaderboard-entry: 2 blocks run, 4 not run",
        "own-data: 1 blocks run, 5 not run",
    ]


@pytest.mark.slow
def test_a_failing_block_ends_the_script(
    tutorials: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "wrong.md").write_text("```bash\nfalse\ntouch after\n```\n")
    monkeypatch.setitem(tutorials["play"].__globals__, "ROOT", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        tutorials["play"]("wrong", tmp_path)
    assert not (tmp_path / "after").exists()


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_of_a_notebook_are_those_of_one_execution_and_name_no_place(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    assert not re.search(r"/(?:home|root|tmp|work)/", notebook.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_cell_of_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Without the real base the notebook goes on with the embedded one."""
    out = tmp_path / "executed.ipynb"
    script("notebook.py", str(notebook), "--out", str(out), bases=tmp_path)
    stored, executed = code_cells(notebook), code_cells(out)
    assert len(stored) == len(executed)
    for before, after in zip(stored, executed, strict=True):
        assert after["source"] == before["source"]
        kinds = [
            {kind for output in cell["outputs"] for kind in output.get("data", {})}
            for cell in (before, after)
        ]
        assert kinds[0] == kinds[1] != set()
