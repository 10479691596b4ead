"""Fixtures of small evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WORDS
from tests.study.evaluation.small import (
    MEDMCQA,
    PUBMEDQA,
    evaluate_target,
    medmcqa_rows,
    save_adapter,
    write_lines,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a few items of two benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_lines(folder / "medmcqa.jsonl", medmcqa_rows(MEDMCQA))
    rows = [
        {
            "QUESTION": f"Does rest help against {WORDS[i]}?",
            "CONTEXTS": [f"We asked {10 + i} patients.", "They rested."],
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i in range(PUBMEDQA)
    ]
    write_lines(folder / "pubmedqa.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter that plain PEFT saved, strong enough to change answers."""
    return save_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "tuned")


@pytest.fixture
def ask(data: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluate with the tests' items on the tiny base, in `tmp_path / "out"`."""

    def call(target: Path | str = "none", **arguments: Any) -> dict[str, Any]:
        settings = {
            "base": str(tiny_base),
            "benchmarks": ["medmcqa", "pubmedqa"],
            "data": data,
            "out": tmp_path / "out",
            "batch_size": 4,
            **arguments,
        }
        return evaluate_target(target, **settings)

    return call
