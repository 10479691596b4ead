"""What a finished run leaves in the SuperLink's database, and its removal."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grandrounds.engines.deployment import tidy
from grandrounds.engines.flower import Link
from grandrounds.errors import ConfigError, EngineError

UPDATE = b"\x93NUMPY the update of a site" * 4000


def bytes_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.glob("superlink.db*"))


@pytest.fixture
def link(tmp_path: Path) -> Link:
    return Link(tmp_path, {}, "trial")


def test_deleted_updates_leave_the_file_while_the_superlink_runs(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower left 16 arrays of a run of two rounds in its write-ahead log."""
    monkeypatch.setattr(tidy, "ask", lambda *_: {"runs": [{"run-id": 1, "status": "finished:x"}]})
    with pytest.raises(ConfigError, match=r"superlink\.db does not exist"):
        tidy.tidy(tmp_path, link)
    with closing(sqlite3.connect(tmp_path / "superlink.db", isolation_level=None)) as superlink:
        superlink.executescript("pragma journal_mode = wal; create table objects (content blob);")
        superlink.execute("insert into objects values (?)", (UPDATE,))
        with pytest.raises(EngineError, match="contains 1 objects of a run in progress"):
            tidy.tidy(tmp_path, link)
        superlink.execute("delete from objects")
        assert b"NUMPY" in bytes_in(tmp_path)
        done = tidy.tidy(tmp_path, link)
        assert b"NUMPY" not in bytes_in(tmp_path)
        assert done.before_bytes > len(UPDATE) > done.after_bytes
        superlink.execute("insert into objects values (?)", (UPDATE,))  # it goes on


@pytest.mark.parametrize("status", ["running", "pending", "starting"])
def test_a_run_in_progress_keeps_its_messages(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    runs: list[Mapping[str, Any]] = [{"run-id": 7, "status": status}]
    monkeypatch.setattr(tidy, "ask", lambda *_: {"runs": runs})
    (tmp_path / "superlink.db").touch()
    with pytest.raises(EngineError, match=r"Run 7 is in progress .* flwr stop RUN_ID trial"):
        tidy.tidy(tmp_path, link)


def test_a_database_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "superlink.db").write_bytes(b"not a database" * 100)
    with pytest.raises(EngineError, match=r"cannot be written .* as the user of the SuperLink"):
        tidy.rewritten(tmp_path / "superlink.db")
