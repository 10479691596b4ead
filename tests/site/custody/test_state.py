"""What a site keeps: files written whole, an index beside them, and the state of before."""

from __future__ import annotations

import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.errors import ConfigError
from grandrounds.site.custody import kept_runs, quota
from grandrounds.site.custody.state import FILE, STATES, SiteState
from grandrounds.site.custody.state_files import read_records, write_records
from grandrounds.site.visit import Visit
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings


def records() -> RecordDict:
    arrays = {f"layer {i}": Array(np.arange(i, i + 5, dtype=np.float32)) for i in range(3)}
    return RecordDict(
        {
            "memory": ArrayRecord(arrays),
            "held": ArrayRecord({"adapter": Array(np.zeros((2, 3), np.float32))}),
            "nothing": ArrayRecord({}),
            "cursor": ConfigRecord({"examples": 7, "name": "a", "more": [1, 2]}),
            "metrics": MetricRecord({"loss": 0.5}),
        }
    )


def test_records_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "ab"
    assert write_records(file, records()) == file.stat().st_size
    assert recorddict_to_proto(read_records(file)) == recorddict_to_proto(records())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [f.name for f in tmp_path.iterdir()] == ["ab"]


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_a_file_that_ends_early_is_an_error(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "ab"
    write_records(file, records())
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="ends early"):
        read_records(file)


def test_a_failed_write_leaves_the_file_of_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ab"
    write_records(file, RecordDict({"a": ConfigRecord({"x": 1})}))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_records(file, records())
    assert list(read_records(file)) == ["a"]
    assert [f.name for f in tmp_path.iterdir()] == ["ab"]


def test_no_state_is_too_large_for_the_tables(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value beyond 1e9 bytes was an error: two error memories at r = 32 on all linears of 8B.
    Here the bound is 100 kB."""
    connect = sqlite3.connect

    def bounded(*words: Any, **options: Any) -> sqlite3.Connection:
        made = connect(*words, **options)
        made.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        return made

    monkeypatch.setattr(sqlite3, "connect", bounded)
    [site, *_] = sites_of(settings, tmp_path)
    asks = Asking(site, settings)

    def remember(visit: Visit) -> RecordDict:
        visit.state["memory"] = ArrayRecord({"a": Array(np.zeros(100_000, np.float32))})
        return asks.note(visit)

    asks("ab", 1, function=remember)
    asks("ab", 2)
    assert asks.visits[1].state.array_records["memory"]["a"].shape == (100_000,)


def test_the_state_of_before_is_taken_over(settings: Settings, tmp_path: Path) -> None:
    """A folder of version 0.1.0: cursors and error memories stay, and so do today's visits."""
    [site, *_] = sites_of(settings, tmp_path)
    folder = site.place("state")
    folder.mkdir(mode=0o700)
    now = time.time()
    kept = RecordDict({"grandrounds-cursor": ConfigRecord({"examples": 24}), **records()})
    with closing(sqlite3.connect(folder / "site.sqlite")) as old, old:
        old.executescript(
            "create table runs (run text primary key, state blob not null, time real not null);"
            "create table visits (time real not null, run text not null, round integer not null);"
            "create table questions (time real not null);"
            "create table hashes (path text not null, size integer not null,"
            " modified integer not null, sha256 text not null, primary key (path, size, modified));"
            "insert into questions values (1); insert into hashes values ('f', 1, 2, 'ab');"
        )
        blob = recorddict_to_proto(kept).SerializeToString()
        old.execute("insert into runs values ('ab', ?, ?)", (blob, now - 3600))
        for hours, run in ((1, "ab"), (2, "ab"), (30, "ef")):
            old.execute("insert into visits values (?, ?, 1)", (now - 3600 * hours, run))
    with closing(SiteState(folder)) as state:
        assert recorddict_to_proto(kept_runs.load(state, "ab")) == recorddict_to_proto(kept)
        assert quota.visits_today(state) == 2
        assert quota.in_progress(state, "ab")
        assert not quota.in_progress(state, "ef")
        [one] = kept_runs.listed(state)
        assert one.last_seconds == pytest.approx(3600, abs=60)
    asks = Asking(site, settings)
    asks("ab", 4)
    assert asks.visits[0].cursor == 24
    assert "memory" in asks.visits[0].state


def test_a_state_that_cannot_be_read_is_told_with_what_to_do(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path)
    asks = Asking(site, settings)
    asks("ab", 1)
    [file] = (site.place("state") / STATES).iterdir()
    file.write_bytes(b"\0" * 7)
    with pytest.raises(ConfigError, match=r"state/states/.*cannot be read.*forget-run"):
        asks("ab", 2)


def test_everything_in_the_state_folder_is_its_owners_alone(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path)
    Asking(site, settings)()
    found = {f: stat.S_IMODE(f.stat().st_mode) for f in site.place("state").rglob("*")}
    assert {mode for f, mode in found.items() if f.is_file()} == {0o600}
    assert {mode for f, mode in found.items() if f.is_dir()} == {0o700}


@pytest.mark.parametrize("command", ["runs", "allow-run", "check"])
def test_a_damaged_index_is_told_by_every_command(
    settings: Settings, tmp_path: Path, command: str
) -> None:
    """It was noticed only where its first page was damaged."""
    [site, *_] = sites_of(settings, tmp_path)
    with closing(SiteState(site.place("state"))) as state:
        state.now()
        state.table.execute("pragma journal_mode = delete")
    file = site.place("state") / FILE
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    result = CliRunner().invoke(app, ["site", command, "--config", str(site.path)])
    assert result.exit_code != 0
    assert "move a damaged site.sqlite away" in result.output
