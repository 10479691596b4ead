"""What a site keeps of each run: error memories, what it holds of the adapter, its configuration.

A run is kept once one of its visits was admitted, for `KEPT_DAYS` after its last one. No message
of another run can end that earlier: where the state folder is full, new visits are refused.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import RecordDict

from grandrounds.config.keys import PLACES_AND_TRACKERS, Config
from grandrounds.config.recipes import defaults
from grandrounds.config.schedules import same_until
from grandrounds.errors import ConfigError, PolicyError, first_line
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.state import SiteState
from grandrounds.site.custody.state_files import read_records, write_records
from grandrounds.site.masks.held import kept_of

KEPT_DAYS = 90
"""Days after its last visit for which a run is kept."""

MOST_BYTES = 32 * 2**30
"""Maximum size of all states and cached replies; the oldest replies go first, states never."""


@dataclass(frozen=True)
class KeptRun:
    """A run that a site knows."""

    run: str
    """Its key."""
    first_seconds: float
    """Seconds since its first visit."""
    last_seconds: float
    """Seconds since its last visit."""
    bytes: int
    """Size of what is kept of it, cached replies included."""


_LENGTH = ("earlier-schedules", "num-server-rounds")
"""Keys that a resume changes, to give a run more rounds."""


def check_pinned(state: SiteState, run: str, config: Config) -> None:
    """Raise `PolicyError` if a run's configuration is not that of its last visit.

    Otherwise a run could reload the base at every visit, or single out examples by their length.
    Only its length may change, as long as the rounds that the site has seen keep their learning
    rates, and the run is not private: its noise is calibrated for its rounds.
    """
    row = state.table.execute("select pinned from kept_runs where run = ?", (run,)).fetchone()
    if row is None or not row[0]:
        return
    # an earlier version has pinned it without the keys that came later
    before, now = {**defaults(), **json.loads(row[0])}, pinned_part(config)
    changed = [
        f"{key}: {before.get(key)!r} → {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed and not _is_longer(state, run, before, config):
        raise PolicyError(
            f"This run's configuration has changed since its first visit here ({'; '.join(changed)}"
            "). A site keeps to the first one; start a new run."
        )


def _is_longer(state: SiteState, run: str, before: Mapping[str, Any], config: Config) -> bool:
    """Return whether a configuration is that of before, with another length from here on."""
    now = pinned_part(config)
    if config.is_private or any(before[key] != now[key] for key in now if key not in _LENGTH):
        return False
    seen = state.count("select max(round) from requests where run = ?", run)
    length = str(before["earlier-schedules"]), int(before["num-server-rounds"])
    return same_until(length, config.federation.length, seen)


def pinned_part(config: Config) -> dict[str, Any]:
    """Return the keys of a run's configuration that may not change from visit to visit."""
    return {key: value for key, value in config.flat().items() if key not in PLACES_AND_TRACKERS}


def note_visit(state: SiteState, run: str, config: Config) -> None:
    """Note a visit of a run, and pin its configuration, which was checked against the last one."""
    pinned, now = json.dumps(pinned_part(config)), state.now()
    state.table.execute(
        "insert into kept_runs (run, first, last, pinned) values (?, ?, ?, ?) "
        "on conflict (run) do update set last = excluded.last, pinned = excluded.pinned",
        (run, now, now, pinned),
    )


def load(state: SiteState, run: str) -> RecordDict:
    """Return what is kept of a run between its visits; empty if there is nothing.

    Raises
    ------
    ConfigError
        If the file cannot be read.
    """
    row = state.table.execute("select file from kept_runs where run = ?", (run,)).fetchone()
    return read_kept(state, row[0]) if row and row[0] else RecordDict()


def read_kept(state: SiteState, file: str) -> RecordDict:
    """Return the records of a file of the state folder; raise `ConfigError` if it is unreadable."""
    try:
        return read_records(state.place(file))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"agent.state: {state.place(file)} cannot be read ({first_line(error)}). Restore it, "
            "or end that run here with grandrounds site forget-run."
        ) from error


def new_file(state: SiteState, folder: str, run: str, records: RecordDict) -> tuple[str, int]:
    """Write records to a new file; return its name for the tables, and its bytes.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    file = f"{folder}/{run}-{secrets.token_hex(8)}"
    try:
        return file, write_records(state.place(file), records)
    except OSError as error:
        raise ConfigError(
            f"agent.state = {state.folder} cannot be written ({first_line(error)}). Free some "
            "space; the visit is not lost if the server asks for it again."
        ) from error


def name_state(table: sqlite3.Connection, run: str, file: str, size: int) -> list[str]:
    """Make a file the state of a run; return the file that it replaces."""
    old = table.execute("select file from kept_runs where run = ?", (run,)).fetchone()
    table.execute("update kept_runs set file = ?, bytes = ? where run = ?", (file, size, run))
    return [old[0]] if old else []


def check_room(state: SiteState) -> None:
    """Drop runs that are too old; raise `PolicyError` if the others fill the state folder."""
    now = state.now()
    query = "select run from kept_runs where last < ?"
    for (run,) in state.table.execute(query, (now - KEPT_DAYS * DAY_SECONDS,)).fetchall():
        forget(state, run)
    size = state.count("select sum(bytes) from kept_runs")
    size += state.count("select sum(bytes) from mask_attempts")
    if size > MOST_BYTES:
        raise PolicyError(
            f"This site keeps {size / 2**30:.1f} GiB of unfinished runs, of at most "
            f"{MOST_BYTES / 2**30:.0f}. Its operator ends some with grandrounds site forget-run."
        )


def forget(state: SiteState, run: str) -> bool:
    """Delete what is kept of a run; return whether there was anything.

    Quotas stay as they are, and of masked sums which rounds were begun: they are over here.
    """
    with state.lasting() as table:
        rows = table.execute(
            "select file from kept_runs where run = ? "
            "union select file from requests where run = ? "
            "union select file from mask_attempts where run = ?",
            (run, run, run),
        ).fetchall()
        table.execute("delete from kept_runs where run = ?", (run,))
        table.execute("delete from requests where run = ?", (run,))
        table.execute("delete from mask_attempts where run = ?", (run,))
        for (data,) in table.execute("select kept from mask_runs where run = ?", (run,)).fetchall():
            kept = kept_of(data)
            over = replace(kept, summed=kept.round).packed()
            table.execute("update mask_runs set kept = ? where run = ?", (over, run))
    state.discard([row[0] for row in rows])
    return bool(rows)


def listed(state: SiteState) -> list[KeptRun]:
    """Return the kept runs, the last visited first."""
    now = state.now()
    rows = state.table.execute(
        "select run, first, last, bytes + (select coalesce(sum(bytes), 0) from requests "
        "where requests.run = kept_runs.run) from kept_runs order by last desc"
    )
    return [KeptRun(run, now - first, now - last, size) for run, first, last, size in rows]
