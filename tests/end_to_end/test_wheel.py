"""The wheel, unpacked outside the checkout, is as good as the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from grandrounds.config.packaged import packaged_recipes, pages
from tests.places import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack it into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def grandrounds(installed: Path, folder: Path, *words: str) -> str:
    """Run a command of the unpacked wheel; return what it printed."""
    code = "import sys; from grandrounds.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_twine_accepts_wheel_and_source_archive(wheel: Path) -> None:
    archives = sorted(map(str, wheel.parent.iterdir()))
    assert [Path(one).suffix for one in archives] == [".whl", ".gz"]
    checked = [sys.executable, "-m", "twine", "check", "--strict", *archives]
    assert subprocess.run(checked, capture_output=True, text=True, check=True).stdout.count(
        "PASSED"
    ) == len(archives)


def test_it_carries_all_recipes_and_pages(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(grandrounds(installed, tmp_path, "recipes", "list", "--json"))
    assert set(listed) == set(packaged_recipes())
    assert all(Path(one["file"]).is_relative_to(installed) for one in listed.values())
    for name, recipe in packaged_recipes().items():
        shown = grandrounds(installed, tmp_path, "recipes", "show", name)
        assert shown.strip() == recipe.path.read_text().strip()
    told = grandrounds(installed, tmp_path, "docs").split()
    assert set(pages()) <= set(told)
    page = grandrounds(installed, tmp_path, "docs", "deployment", "--path").strip()
    assert Path(page).is_relative_to(installed)


def test_it_plans_by_name_runs_evaluates_and_reports(installed: Path, tmp_path: Path) -> None:
    planned = grandrounds(installed, tmp_path, "plan", "jsl-medllama-3-8b", "--json", "-")
    assert json.loads(planned)["communication"]
    small = ("--rounds", "1", "--set", "train.training-arguments.max-steps=1")
    grandrounds(installed, tmp_path, "run", "--run-dir", "run", *small)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    grandrounds(installed, tmp_path, "report", "run")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert "private" in grandrounds(installed, tmp_path, "evaluate", "run")
