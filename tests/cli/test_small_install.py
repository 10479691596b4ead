"""What `pip install "grandrounds[cli]"` is enough for: to plan, and to read finished runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.study.report.run_files import write_run

WITHOUT = """
import importlib.abc, sys

ABSENT = {absent!r}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["grandrounds", *{arguments!r}]
from grandrounds.__main__ import main
main()
"""

ABSENT = (
    *("torch", "flwr", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"),
    *("flwr_datasets", "scipy", "datasketch", "psutil", "cryptography", "sqlalchemy", "psycopg"),
    *("stdnum", "dp_accounting", "gguf", "sentencepiece", "httpx", "huggingface_hub", "pandas"),
)
"""What `grandrounds[all]` installs beyond `grandrounds[cli]`, by its own name."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "jsl-medllama-3-8b"),
        ("recipes", "list"),
        ("report", "RUN"),
        ("report", "RUN", "OTHER"),
        ("dossier", "RUN"),
    ],
    ids=" ".join,
)
def test_without_what_trains(arguments: tuple[str, ...], tmp_path: Path) -> None:
    runs = {name: str(write_run(tmp_path / name)) for name in ("RUN", "OTHER")}
    named = [runs.get(word, word) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=ABSENT, arguments=named)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
