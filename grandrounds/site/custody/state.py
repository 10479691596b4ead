"""The state of a site between messages, runs and restarts: a SQLite file of the agent."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from grandrounds.errors import ConfigError, first_line

FILE = "site.sqlite"
DAY_SECONDS = 24 * 3600
RUNS_KEPT = 32
"""Number of runs whose cursors and error memories are kept; older ones are deleted."""

TABLES = """
pragma journal_mode = wal;
pragma synchronous = full;
create table if not exists runs (run text primary key, state blob not null, time real not null);
create table if not exists visits (time real not null, run text not null, round integer not null);
create table if not exists questions (time real not null);
"""


class SiteState:
    """Opened for each message, so that a crash loses nothing held in memory."""

    def __init__(self, folder: Path) -> None:
        """Open the state in a folder, which is created with access for this user only.

        Raises
        ------
        ConfigError
            If the folder cannot be written, or other users have access to it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o077:
                raise ConfigError(
                    f"agent.state = {folder} is accessible to other users; it holds state derived "
                    f"from the site's data. Run chmod 700 {folder}"
                )
            self._connection = sqlite3.connect(folder / FILE, timeout=60, isolation_level=None)
            (folder / FILE).chmod(0o600)
            self._connection.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"agent.state = {folder} cannot be used ({first_line(error)}). Set a folder that "
                "the agent's user can write, or remove a damaged site.sqlite: the server sends the "
                "cursors, and only the error memories of codecs are lost."
            ) from error
        self.folder = folder

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def load(self, run: str) -> RecordDict:
        """Return the state of a run; empty if there is none."""
        row = self._connection.execute("select state from runs where run = ?", (run,)).fetchone()
        if row is None:
            return RecordDict()
        return recorddict_from_proto(ProtoRecordDict.FromString(row[0]))

    def save(self, run: str, state: RecordDict) -> None:
        """Save the state of a run atomically."""
        blob = recorddict_to_proto(state).SerializeToString()
        with self._connection:
            self._connection.execute(
                "insert or replace into runs values (?, ?, ?)", (run, blob, time.time())
            )
            self._connection.execute(
                "delete from runs where run not in (select run from runs order by time desc "
                "limit ?)",
                (RUNS_KEPT,),
            )

    def count_visit(self, run: str, round_number: int) -> None:
        """Record a request to train or to evaluate."""
        with self._connection:
            self._connection.execute(
                "insert into visits values (?, ?, ?)", (time.time(), run, round_number)
            )
            self._connection.execute(
                "delete from visits where time < ?", (time.time() - 2 * DAY_SECONDS,)
            )

    def count_question(self) -> int:
        """Record a roll call; return their number in the last 24 hours."""
        now = time.time()
        with self._connection:
            self._connection.execute("insert into questions values (?)", (now,))
            self._connection.execute("delete from questions where time < ?", (now - DAY_SECONDS,))
            return int(self._connection.execute("select count(*) from questions").fetchone()[0])

    def visits_today(self) -> int:
        """Return the number of visits in the last 24 hours."""
        since = time.time() - DAY_SECONDS
        query = "select count(*) from visits where time > ?"
        return int(self._connection.execute(query, (since,)).fetchone()[0])
