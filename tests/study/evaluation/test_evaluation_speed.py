"""The speed benchmark runs, on a handful of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

REPOSITORY = ROOT


def write_questions(folder: Path) -> None:
    """Write a few questions in the columns of MedMCQA and of MedQA."""
    options = {"A": "Rest", "B": "Tea", "C": "Soup and a walk", "D": "Time"}
    mcqa = {f"op{letter.lower()}": text for letter, text in options.items()}
    questions = [f"What helps patient {i} against {'a long ' * i}fever?" for i in range(40)]
    (folder / "medmcqa.jsonl").write_text(
        "".join(json.dumps({"question": q, **mcqa, "cop": 0}) + "\n" for q in questions)
    )
    (folder / "medqa.jsonl").write_text(
        "".join(
            json.dumps({"question": q, "options": options, "answer": "Tea"}) + "\n"
            for q in questions
        )
    )


@pytest.mark.slow
def test_the_benchmark_compares_equal_answers_and_writes_what_it_prints(tmp_path: Path) -> None:
    write_questions(tmp_path)
    out = tmp_path / "speed.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "evaluation_speed.py")]
    options = ["--data", str(tmp_path), "--texts", str(tmp_path / "medqa.jsonl")]
    small = ["--limit", "12", "--times", "1", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [*command, *options, *small], check=True, capture_output=True, text=True, cwd=REPOSITORY
    )
    result = json.loads(out.read_text())
    assert done.stdout.startswith("6.3 M parameters, float32, 1 threads")
    for name in ("medmcqa", "medqa"):
        row = result[name]
        assert row["prompts"] == 12
        assert row["distinct_answers"] > 1
        assert 0 < row["shared_prefix_tokens"] < row["mean_prompt_tokens"]
        assert row["work_ratio"] > 1
        assert f"{row['ratio']:.2f}x" in done.stdout
