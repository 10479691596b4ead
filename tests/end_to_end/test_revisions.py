"""A run on a base and data of the hub records which commits it read, and goes on with no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from grandrounds.data import sources
from grandrounds.errors import RunDirectoryError
from grandrounds.model import tokenizers
from grandrounds.site import local_data, visit
from grandrounds.study.evaluation.tasks import find_target
from tests.model.test_tokenizers import NEW, OLD, cached_hub
from tests.runs import Settings, config_of, interrupted_at, play, read_json

DATA = "c" * 40


@pytest.fixture
def hub(tiny_base: Path, flashcards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two commits of a base, and a data set."""
    rows = [json.loads(line) for line in flashcards.read_text().splitlines()]

    def load_dataset(name: str, split: str, revision: str) -> datasets.Dataset:
        assert (name, split, revision) == ("someone/cards", "train", "v2")
        loaded = datasets.Dataset.from_list(rows)
        loaded.info.download_checksums = {f"hf://datasets/{name}@{DATA}/train.jsonl": {}}
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return cached_hub(tiny_base, tmp_path / "hub", monkeypatch)


def fresh_process() -> None:
    """Forget what a process has read, as after a restart."""
    for cached in (
        tokenizers.tokenizer_of,
        sources._load_hub,
        local_data._open,
        visit._fingerprint,
    ):
        cached.cache_clear()


def test_commits_are_recorded_and_a_run_is_resumed_on_no_others(
    settings: Settings, hub: Path
) -> None:
    from_hub: dict[str, Any] = {
        "model.name": "someone/tiny",
        "model.revision": "v1",
        "static.dataset.name": "someone/cards",
        "static.dataset.revision": "v2",
        "num-server-rounds": 2,
        "train.save-every-round": 1,
    }
    fresh_process()
    with pytest.raises(KeyboardInterrupt):
        play({**settings, **from_hub}, listener=interrupted_at("round", 2))
    run = Path(settings["run-directory"])
    for site in read_json(run / "sites.json"):
        assert (site["base-commit"], site["data-commit"]) == (OLD, DATA)
    assert config_of(run).model.revision == "v1"
    assert read_json(run / "peft_1" / "adapter_config.json")["revision"] == "v1"
    card = (run / "peft_1" / "README.md").read_text()
    assert f"someone/tiny, revision v1 = commit {OLD}, not quantised" in card
    assert f", revision v2 = commit {DATA} |" in card
    assert find_target(str(run)).base == find_target(str(run / "peft_1")).base == "someone/tiny@v1"
    (hub / "models--someone--tiny" / "refs" / "v1").write_text(NEW)  # the tag was moved
    fresh_process()
    with pytest.raises(RunDirectoryError, match=r"base-commit was a{40} and is now b{40}"):
        play({**settings, **from_hub, "run-directory": "", "resume-from": str(run)})
