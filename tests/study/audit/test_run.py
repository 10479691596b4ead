"""The recipe of an audited run: everything as it was, but for the data."""

from __future__ import annotations

from pathlib import Path

from grandrounds.config.recipes import resolve
from grandrounds.study.audit.run import in_world


def test_the_world_takes_the_place_of_a_part_of_a_hub_data_set(tmp_path: Path) -> None:
    """Its split was kept, and a file has none: the audit was refused."""
    of_the_hub = {"name": "org/cards", "config": "en", "split": "train[:500]", "revision": "v1"}
    config = resolve({f"static.dataset.{key}": value for key, value in of_the_hub.items()})
    audited = in_world(config, tmp_path)
    assert audited.static.source == str(tmp_path / "world.jsonl")
    assert audited.lora == config.lora
