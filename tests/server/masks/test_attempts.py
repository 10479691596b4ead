"""Which attempts a round of a masked run gets, in a process after the one that began it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import RunDirectoryError
from grandrounds.server.directory import JOURNAL, RunDirectory
from grandrounds.server.masks.attempts import Masks

WHOLE = '{"round": 2, "attempt": 1, "unmask-asked": true, "sites": [0, 1, 2]}'


def numbers(folder: Path, text: str, round_number: int = 2) -> list[int]:
    """Return the attempts at a round if this was written of it."""
    (folder / JOURNAL).write_text(text)
    nothing: Any = None
    masks = Masks(nothing, nothing, RunDirectory(folder))
    asked: Any = type("Asked", (), {"number": round_number})
    return [number for number, _ in masks._tries(asked, masks._before(round_number))]


def test_an_attempt_is_played_again_and_others_follow_only_before_unmask(tmp_path: Path) -> None:
    assert numbers(tmp_path, WHOLE) == [1]
    assert numbers(tmp_path, WHOLE.replace("true", "false")) == [1, 2, 3]
    assert numbers(tmp_path, WHOLE, 3) == [0, 1, 2]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"round": "x"}', WHOLE.replace("[0, 1, 2]", "7")])
def test_a_damaged_journal_is_told_with_what_to_do(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunDirectoryError, match=r"masks\.json is damaged .*Remove it, and resume"):
        numbers(tmp_path, text)
