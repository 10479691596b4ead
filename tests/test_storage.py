"""Folders are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from grandrounds.storage import found, whole_folder


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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors and others write under temporary names that only the owner may read."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "target") as partial:
            (partial / "inner").mkdir()
            (partial / "plain").write_text("as the system makes it")
            (partial / "inner" / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "target").rglob("*") if file.is_file()]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode, mode]


def test_a_word_that_can_be_no_path_names_nothing(tmp_path: Path) -> None:
    assert found(str(tmp_path)) == tmp_path
    for word in ("a" * 300, "~no-such-user/x", str(tmp_path / "missing"), "a\0b"):
        assert found(word) is None
