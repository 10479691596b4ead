"""A site's attempts at masked sums in its custody: rows of `site.sqlite`, masked vectors in files.

Whatever leaves the site is on disk before. `site forget-run` deletes attempts and vectors; which
rounds were begun is never forgotten, and the site takes no part in them again, since a second sum
of a round gives away a single update. Attempts of a run that has never trained here go after
`UNTRAINED_DAYS`: the site has sent no vector for any of them.
"""

from __future__ import annotations

import sqlite3

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from grandrounds.errors import ConfigError, PolicyError
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.kept_runs import new_file, read_kept
from grandrounds.site.custody.state import REPLIES, SiteState
from grandrounds.site.masks.held import (
    Held,
    Kept,
    begun,
    held_of,
    is_over,
    kept_of,
    summed,
    with_earlier,
)
from grandrounds.wire.masks.attempt import UNMASK, Attempt

_VECTOR = "vector"

UNTRAINED_DAYS = 7
"""Days for which an attempt is kept of a run that has not trained here.

At most 1,400 are of runs that no operator has allowed (`quota.MOST_QUESTIONS_OF_OTHERS`)."""


class CustodyStore:
    """Attempts in a site's state (`Store`)."""

    def __init__(self, state: SiteState) -> None:
        self._state = state

    def begin(self, held: Held) -> None:
        """Keep a new attempt, if `begun` allows it; those that are over or too old are erased."""
        attempt, now = held.attempt, self._state.now()
        with self._state.lasting() as table:
            _keep(table, attempt.run, begun(_kept(table, attempt.run), attempt))
            gone, before = [], []
            for number, data, file in table.execute(
                "select rowid, held, file from mask_attempts where run = ?", (attempt.run,)
            ).fetchall():
                before.append(held_of(data))
                if is_over(before[-1], attempt):
                    table.execute("delete from mask_attempts where rowid = ?", (number,))
                    gone.append(file)
            _delete_untrained(table, now)
            packed = with_earlier(held, before).packed()
            table.execute(
                "insert into mask_attempts (run, round, number, held, at) values (?, ?, ?, ?, ?)",
                (attempt.run, attempt.round, attempt.number, packed, now),
            )
        self._state.discard(gone)
        self._state.erase()

    def read(self, attempt: Attempt) -> Held | None:
        """Return an attempt; None if there is none under this roster."""
        row = self._row(attempt)
        held = held_of(row[0]) if row else None
        return held if held and held.attempt == attempt else None

    def replace(self, held: Held, before: str, vector: bytes = b"") -> None:
        """Replace what is kept of an attempt, if `summed` allows it where its stage is `unmask`.

        Raises
        ------
        PolicyError
            If its stage is another one by now.
        ConfigError
            If the state folder cannot be written; the request can be made again.
        """
        attempt = held.attempt
        file, size = "", 0
        if vector:
            array = Array(np.frombuffer(vector, dtype=np.uint8))
            records = RecordDict({_VECTOR: ArrayRecord({_VECTOR: array})})
            file, size = new_file(self._state, REPLIES, attempt.run, records)
        with self._state.lasting() as table:
            known = self.read(attempt)
            if known is None or known.stage != before:
                self._state.discard([file])
                raise PolicyError(f"This attempt is not at the exchange {before!r} any more.")
            if held.stage == UNMASK:
                _keep(table, attempt.run, summed(_kept(table, attempt.run), attempt))
            table.execute(
                "update mask_attempts set held = ? where run = ? and round = ? and number = ?",
                (held.packed(), attempt.run, attempt.round, attempt.number),
            )
            if vector:
                table.execute(
                    "update mask_attempts set file = ?, bytes = ? "
                    "where run = ? and round = ? and number = ?",
                    (file, size, attempt.run, attempt.round, attempt.number),
                )
        self._state.erase()  # secrets that the attempt no longer needs

    def vector(self, attempt: Attempt) -> bytes | None:
        """Return an attempt's masked vector; None if it is not kept, or its file is damaged."""
        row = self._row(attempt)
        if row is None or not row[1]:
            return None
        try:
            records = read_kept(self._state, row[1])
        except ConfigError:
            return None
        return records.array_records[_VECTOR][_VECTOR].numpy().tobytes()

    def _row(self, attempt: Attempt) -> tuple[bytes, str] | None:
        found: tuple[bytes, str] | None = self._state.table.execute(
            "select held, file from mask_attempts where run = ? and round = ? and number = ?",
            (attempt.run, attempt.round, attempt.number),
        ).fetchone()
        return found


def tidy(state: SiteState) -> None:
    """Delete the attempts of runs that have not trained here in time."""
    with state.lasting() as table:
        _delete_untrained(table, state.now())
    state.erase()


def _delete_untrained(table: sqlite3.Connection, now: float) -> None:
    table.execute(
        "delete from mask_attempts where at < ? and run not in (select run from kept_runs)",
        (now - UNTRAINED_DAYS * DAY_SECONDS,),
    )


def _kept(table: sqlite3.Connection, run: str) -> Kept | None:
    row = table.execute("select kept from mask_runs where run = ?", (run,)).fetchone()
    return kept_of(row[0]) if row else None


def _keep(table: sqlite3.Connection, run: str, kept: Kept) -> None:
    table.execute("insert or replace into mask_runs values (?, ?)", (run, kept.packed()))
