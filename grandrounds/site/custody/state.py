"""The state of a site between messages, runs and restarts: an index in SQLite, beside it files.

The tables hold what is counted and which files are valid; adapters' states and cached replies are
files of their own (`state_files`). A file becomes valid in the transaction that names it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from grandrounds.errors import ConfigError, first_line
from grandrounds.site.custody import earlier_state
from grandrounds.site.custody.clock import Reading, first_reading, next_reading

FILE = "site.sqlite"
STATES, REPLIES = "states", "replies"
"""Folders of the two kinds of files."""

_PARTIAL_SECONDS = 3600
"""Age at which a file that no transaction names was left by a crash."""

VERSION = 4

TABLES = """
create table if not exists clock (
    one integer primary key check (one = 1),
    site real not null, wall real not null, boot real not null, boot_id text not null
);
create table if not exists kept_runs (
    run text primary key, first real not null, last real not null,
    pinned text not null default '', file text not null default '', bytes integer not null default 0
);
create table if not exists requests (
    run text not null, digest text not null, round integer not null, kind text not null,
    at real not null, epoch integer not null, place integer not null,
    file text not null default '', bytes integer not null default 0,
    primary key (run, digest)
);
create table if not exists position (
    one integer primary key check (one = 1), epoch integer not null, place integer not null
);
create table if not exists visit_log (at real not null, run text not null, round integer not null);
create table if not exists question_log (at real not null, run text not null);
create table if not exists grants (at real not null, run text not null);
create table if not exists searched (version text primary key, at real not null);
create table if not exists budget (
    number integer primary key, entry text not null, sha256 text not null
);
create table if not exists coins (
    run text not null, digest text not null, key blob not null, primary key (run, digest)
);
create table if not exists reservations (
    run text primary key, at real not null, terms text not null, mechanism text not null
);
create table if not exists mask_attempts (
    run text not null, round integer not null, number integer not null, held blob not null,
    file text not null default '', bytes integer not null default 0, at real not null default 0,
    primary key (run, round, number)
);
create table if not exists mask_runs (run text primary key, kept blob not null);
create table if not exists refusals (
    bucket text primary key, since real not null, refused integer not null,
    unlogged integer not null
);
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
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o077:
                raise ConfigError(
                    f"agent.state = {folder} is accessible to other users; it holds state derived "
                    f"from the site's data. Run chmod 700 {folder}"
                )
            for name in (STATES, REPLIES):
                (folder / name).mkdir(exist_ok=True, mode=0o700)
            self.table = sqlite3.connect(folder / FILE, timeout=60, isolation_level=None)
            (folder / FILE).chmod(0o600)
            self.table.execute("pragma synchronous = normal")
            self.table.execute("pragma secure_delete = on")  # keys of coins and masks (`erase`)
            self._make_tables()
        except (OSError, sqlite3.Error) as error:
            raise _unusable(folder, error) from error

    def close(self) -> None:
        """Close the file."""
        self.table.close()

    def now(self) -> float:
        """Return the site's own time in seconds (`clock`)."""
        row = self.table.execute("select site, wall, boot, boot_id from clock").fetchone()
        last = Reading(*row) if row else None
        now = next_reading(last) if last else first_reading()
        if last is None or now.site - last.site >= 1 or now.boot_id != last.boot_id:
            values = (now.site, now.wall, now.boot, now.boot_id)
            self.table.execute("insert or replace into clock values (1, ?, ?, ?, ?)", values)
            return now.site
        return now.site

    @contextmanager
    def lasting(self) -> Iterator[sqlite3.Connection]:
        """Group changes: all or none, on disk afterwards, and nobody else writes meanwhile."""
        self.table.execute("pragma synchronous = full")
        self.table.execute("begin immediate")
        try:
            yield self.table
        except BaseException:
            self.table.execute("rollback")
            raise
        else:
            self.table.execute("commit")
        finally:
            self.table.execute("pragma synchronous = normal")

    def count(self, query: str, *values: object) -> int:
        """Return the number that a query gives."""
        return int(self.table.execute(query, values).fetchone()[0] or 0)

    def place(self, file: str) -> Path:
        """Return the path of a file that a table names."""
        return self.folder / file

    def discard(self, files: list[str]) -> None:
        """Delete files that no table names any more."""
        for file in files:
            if file:
                self.place(file).unlink(missing_ok=True)

    def erase(self) -> None:
        """Empty the write-ahead log, which holds deleted rows until its pages are written back."""
        self.table.execute("pragma wal_checkpoint(truncate)").fetchall()

    def tidy(self) -> None:
        """Delete what a crash left: files older than an hour that no table names."""
        rows = self.table.execute(
            "select file from kept_runs union select file from requests "
            "union select file from mask_attempts"
        )
        named = {row[0] for row in rows}
        for file in [*self.place(STATES).iterdir(), *self.place(REPLIES).iterdir()]:
            with suppress(FileNotFoundError):
                old = time.time() - file.stat().st_mtime > _PARTIAL_SECONDS
                if old and f"{file.parent.name}/{file.name}" not in named:
                    file.unlink()

    def _make_tables(self) -> None:
        if self.count("pragma user_version") >= VERSION:
            return
        self.table.execute("pragma journal_mode = wal")
        self.table.executescript(TABLES)
        with self.lasting() as table:
            earlier_state.take_over(table, self.folder, STATES, self.now())
            earlier_state.date_attempts(table, self.now())
            table.execute(f"pragma user_version = {VERSION}")


@contextmanager
def opened(folder: Path) -> Iterator[SiteState]:
    """Open the state in a folder, for a command of the site's operator.

    Raises
    ------
    ConfigError
        If it cannot be opened, or is found damaged meanwhile.
    """
    try:
        with closing(SiteState(folder)) as state:
            yield state
    except sqlite3.Error as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"agent.state = {folder} cannot be used ({first_line(error)}). Give the agent's user "
        "access, or move a damaged site.sqlite away: quotas start anew, and cursors, error "
        "memories and cached replies of unfinished runs are lost. It also holds the privacy "
        "budget: once private runs have visited, restore its newest copy instead. Without it, as "
        "with another folder, nobody knows what was spent, and the site makes no private visits."
    )
