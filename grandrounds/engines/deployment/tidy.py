"""Removes what runs have left in the SuperLink's database: the sites' updates, above all.

Flower deletes the messages of a finished run, but not their bytes: they stay in the file's free
pages and in its write-ahead log until something else overwrites them.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.words import command
from grandrounds.engines.deployment.set_up import DATABASE
from grandrounds.engines.flower import Link, ask
from grandrounds.errors import ConfigError, EngineError, first_line

PATIENCE_SECONDS = 60.0
"""How long to wait for the SuperLink to release its database."""


@dataclass(frozen=True)
class Tidied:
    """What the removal has achieved."""

    before_bytes: int
    after_bytes: int
    """Size of the database with its write-ahead log."""


def tidy(folder: Path, link: Link) -> Tidied:
    """Remove the messages of finished runs from the SuperLink's database, and their bytes.

    The SuperLink may go on running. `flwr list` makes Flower delete what belongs to finished runs;
    then the file is written anew, without what was deleted.

    Parameters
    ----------
    folder : Path
        Folder of the consortium.

    Raises
    ------
    ConfigError
        If there is no database.
    EngineError
        If a run is in progress, or the database cannot be written.
    """
    if not (folder / DATABASE).is_file():
        raise ConfigError(f"{folder / DATABASE} does not exist: no SuperLink has run here.")
    runs = ask(link, "list", link.connection)["runs"]
    if going := [str(run["run-id"]) for run in runs if "finished" not in str(run["status"])]:
        raise EngineError(
            f"Run {', '.join(going)} is in progress and needs its messages: tidy up afterwards, or "
            f"end it: {command('flwr', 'stop', 'RUN_ID', link.connection)}"
        )
    return rewritten(folder / DATABASE)


def rewritten(database: Path) -> Tidied:
    """Write a database anew, without the bytes of what was deleted from it.

    While that takes, nobody else can write to it.

    Raises
    ------
    EngineError
        If it contains messages of a run, cannot be written, or another process reads from it all
        the time.
    """
    before = _bytes_of(database)
    try:
        with closing(
            sqlite3.connect(database, timeout=PATIENCE_SECONDS, isolation_level=None)
        ) as connection:
            if left := _messages(connection):
                raise EngineError(f"{database} contains {left} objects of a run in progress.")
            connection.execute("vacuum")
            [(is_busy, *_)] = connection.execute("pragma wal_checkpoint(truncate)")
    except sqlite3.Error as error:
        raise EngineError(
            f"{database} cannot be written ({first_line(error)}). Run this as the user of the "
            "SuperLink."
        ) from error
    if is_busy:
        raise EngineError(f"{database} is in use; try again when no run is in progress.")
    return Tidied(before, _bytes_of(database))


def _messages(connection: sqlite3.Connection) -> int:
    """Return how many parts of messages Flower has not deleted."""
    tables = connection.execute("select name from sqlite_master where name = 'objects'").fetchall()
    return int(connection.execute("select count(*) from objects").fetchone()[0]) if tables else 0


def _bytes_of(database: Path) -> int:
    files = (database, database.with_name(f"{database.name}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())
