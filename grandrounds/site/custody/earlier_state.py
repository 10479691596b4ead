"""Takes over the state of a site as earlier versions wrote it: everything in tables, or undated."""

from __future__ import annotations

import secrets
import sqlite3
import time
from pathlib import Path

from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.state_files import write_records

_VISIT_DAYS = 2


def take_over(table: sqlite3.Connection, folder: Path, states: str, now: float) -> None:
    """Move the runs of the old tables into files, and their visits onto the site's clock.

    Parameters
    ----------
    states : str
        Folder of the files, in the state folder.
    now : float
        The site's own time.
    """
    names = {row[0] for row in table.execute("select name from sqlite_master where type = 'table'")}
    wall = time.time()

    def at(moment: float) -> float:
        return now - min(max(wall - moment, 0.0), _VISIT_DAYS * DAY_SECONDS)

    if "runs" in names:
        for (run,) in table.execute("select run from runs").fetchall():
            blob, moment = table.execute(
                "select state, time from runs where run = ?", (run,)
            ).fetchone()
            records = recorddict_from_proto(ProtoRecordDict.FromString(blob))
            file = f"{states}/{run}-{secrets.token_hex(4)}"
            size = write_records(folder / file, records)
            table.execute(
                "insert or ignore into kept_runs (run, first, last, file, bytes) "
                "values (?, ?, ?, ?, ?)",
                (run, at(moment), at(moment), file, size),
            )
        table.execute("drop table runs")
    if "visits" in names:
        for moment, run, number in table.execute("select time, run, round from visits").fetchall():
            table.execute("insert into visit_log values (?, ?, ?)", (at(moment), run, number))
        table.execute("drop table visits")
    table.execute("drop table if exists questions")
    table.execute("drop table if exists hashes")


def date_attempts(table: sqlite3.Connection, now: float) -> None:
    """Give attempts at masked sums, which once had no time, that of this moment."""
    columns = {row[1] for row in table.execute("pragma table_info(mask_attempts)")}
    if "at" not in columns:
        table.execute("alter table mask_attempts add column at real not null default 0")
    table.execute("update mask_attempts set at = ? where at = 0", (now,))
