"""CONTRIBUTING's recipes, followed word for word on a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT


def blocks(heading: str) -> list[str]:
    """Return the Python blocks of a section of CONTRIBUTING.md: the file, then the row."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def follow(package: Path, heading: str, file: str, table: str, ending: str) -> None:
    """Write the file, and put the row at the end of its table."""
    code, row = blocks(heading)
    (package / file).write_text(code)
    text = (package / table).read_text()
    place = text.index("\n}\n", text.index(ending))
    (package / table).write_text(f"{text[:place]}\n{row.rstrip()}{text[place:]}")


@pytest.mark.slow
def test_a_rule_and_a_codec_are_one_file_and_one_row_each(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    package = tmp_path / "copy" / "grandrounds"
    shutil.copytree(ROOT / "grandrounds", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", package.parent)
    rule = ("server/aggregation/largest.py", "config/strategies.py", "STRATEGIES: dict")
    follow(package, "Add an aggregation rule", *rule)
    codec = ("wire/codecs/half.py", "config/codecs.py", "CODECS: dict")
    follow(package, "Add a codec", *codec)
    settings |= {
        "strategy.name": "largest",
        "communication.uplink-codec": "fp16",
        "communication.downlink-codec": "fp16",
        "run-directory": str(tmp_path / "run"),
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "grandrounds", "run", *sets]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert summary["status"] == "completed"
    assert summary["failed_replies"] == 0
    assert plan["totals"] == ledger["totals"]
