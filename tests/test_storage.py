"""Folders are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from grandrounds.storage import whole_folder


def test_a_folder_with_folders_in_it_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("old", "new"):
        with whole_folder(target, replace=True) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "file").write_text(text)
    assert (target / "inner" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_on_the_way_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), whole_folder(target) as partial:
        (partial / "missing" / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_was_filled_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(OSError, match="not empty"), whole_folder(target) as partial:  # noqa: PT012
        (partial / "new").write_text("new")
        (target / "precious").write_text("kept")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["precious"]
