"""The privacy budget of a site: what its runs may spend of ε, and what they have spent, for ever.

A run is charged at its first private visit: the ε of all visits that it may make, by PLD at noise,
sampling rate and clipping norm that were fixed at the roll call. A visit is charged before its
first gradient. Neither is refunded. Over runs ε and delta add up, which holds however a run was
chosen after the ones before it (Dwork and Roth, The algorithmic foundations of differential
privacy, 2014, theorem 3.16).

The charges are a table in which every line holds the SHA-256 of the line before it. The number of
the last line is also in a file of its own (`sequence`), which a table from a backup is behind.
Whatever is in doubt is refused.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import BudgetError, PolicyError, first_line
from grandrounds.site.custody.clock import utc_text
from grandrounds.site.custody.sequence import (
    NOTHING,
    check_started,
    in_doubt,
    known_sequence,
    sequence_file,
    write_sequence,
)
from grandrounds.site.custody.site_file import Privacy, SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.site.private.accountant import accountant_name, epsilon_of
from grandrounds.site.private.mechanism import Mechanism

RUN, VISIT = "run", "visit"
"""Kinds of charges."""

KEY_BYTES = 32


@dataclass(frozen=True)
class ChargedRun:
    """What a run was charged, and what it has used of it."""

    run: str
    """Its key."""
    day: str
    """Day of its first visit, in UTC."""
    mechanism: Mechanism
    """Fixed for all of its visits."""
    epsilon: float
    """ε of all visits that it may make: what it was charged."""
    unit_column: str
    """Column of the units at that time."""
    visits: int
    """Visits charged so far."""

    @property
    def spent(self) -> float:
        """ε of the visits so far."""
        return min(self.epsilon, epsilon_of(self.mechanism, self.visits))

    @property
    def visits_left(self) -> int:
        """Visits that are still answered."""
        return max(0, self.mechanism.visits - self.visits)


@dataclass(frozen=True)
class Budget:
    """All charges of a site."""

    runs: Mapping[str, ChargedRun]
    lines: int
    """Number of the last line."""
    sha256: str
    """Of the last line."""

    @property
    def epsilon(self) -> float:
        """ε of all runs together."""
        return sum(run.epsilon for run in self.runs.values())

    @property
    def delta(self) -> float:
        """Delta of all runs together."""
        return sum(run.mechanism.delta for run in self.runs.values())


def read(site: SiteFile, state: SiteState | None) -> Budget:
    """Return the charges of a site, verified.

    Parameters
    ----------
    state : SiteState, optional
        None: the site has no state yet.

    Raises
    ------
    PolicyError
        If the table is missing, damaged, or older than the sequence file.
    """
    file = sequence_file(site)
    # Read before the table, to which another process may add lines meanwhile.
    known = known_sequence(file)
    lines = _lines(state) if state else []
    runs: dict[str, ChargedRun] = {}
    previous = NOTHING
    for place, (number, entry, sha256) in enumerate(lines, 1):
        if number != place or sha256 != _sha256(entry):
            raise in_doubt(f"line {place} was removed or changed")
        try:
            found = json.loads(entry)
            if found["previous"] != previous:
                raise in_doubt(f"line {place} does not continue the one before it")
            _add(runs, found)
        except (ValueError, KeyError, TypeError) as error:
            raise in_doubt(f"line {place} cannot be read") from error
        previous = sha256
    if lines and known is None:
        known = known_sequence(file)  # the first line was added meanwhile
    _check_sequence(file, known, lines)
    return Budget(runs, len(lines), previous)


def _lines(state: SiteState) -> list[tuple[int, str, str]]:
    with readable("its table"):
        rows = state.table.execute("select number, entry, sha256 from budget order by number")
        return [(int(number), str(entry), str(sha256)) for number, entry, sha256 in rows]


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise `PolicyError` where a table of the budget is gone or damaged."""
    try:
        yield
    except sqlite3.Error as error:
        raise in_doubt(f"{what} cannot be read ({first_line(error)})") from error


def start(site: SiteFile, state: SiteState) -> bool:
    """Begin to count a site's charges at 0; return False if it has begun before.

    Raises
    ------
    PolicyError
        If the table has charges, or the budget is in doubt.
    ConfigError
        If the sequence file cannot be written.
    """
    file = sequence_file(site)
    with state.lasting():
        read(site, state)  # refuses a table with lines and no file
        if file.exists():
            return False
        write_sequence(file, 0, NOTHING)
    return True


def _add(runs: dict[str, ChargedRun], entry: Mapping[str, Any]) -> None:
    if entry["kind"] == RUN:
        runs[entry["run"]] = ChargedRun(
            run=entry["run"],
            day=entry["time"][:10],
            mechanism=Mechanism(**entry["mechanism"]),
            epsilon=float(entry["epsilon"]),
            unit_column=entry["unit-column"],
            visits=0,
        )
        return
    run = runs[entry["run"]]
    runs[run.run] = ChargedRun(**{**vars(run), "visits": run.visits + 1})


def _check_sequence(
    file: Path, known: tuple[int, str] | None, lines: Sequence[tuple[int, str, str]]
) -> None:
    """Raise `PolicyError` if the table lacks a line that the sequence file knows."""
    if known is None:
        if lines:
            raise in_doubt(f"{file.name} is missing")
        return
    number, sha256 = known
    if number > len(lines):
        raise in_doubt(
            f"it has {len(lines)} lines, but had {number}: it was restored from a backup, or "
            "removed"
        )
    if sha256 != (lines[number - 1][2] if number else NOTHING):
        raise in_doubt(f"line {number} is not the one that {file.name} knows")


def check_run(privacy: Privacy, budget: Budget, mechanism: Mechanism, epsilon: float) -> None:
    """Check that a new run may be charged.

    Raises
    ------
    BudgetError
        If it would exceed what all runs may spend.
    PolicyError
        If runs were charged for other units before.
    """
    for run in budget.runs.values():
        if run.unit_column != privacy.unit_column:
            raise PolicyError(
                f"privacy.unit-column was {run.unit_column!r} for the run of {run.day} and is now "
                f"{privacy.unit_column!r}: what was spent of other units cannot be compared. Set "
                "it back."
            )
    if budget.epsilon + epsilon > privacy.epsilon_total * (1 + 1e-9):
        raise BudgetError(
            f"The privacy budget of this site is spent: epsilon-total = {privacy.epsilon_total:g}, "
            f"of which earlier runs were charged {budget.epsilon:.3g}; this one needs "
            f"{epsilon:.3g}."
        )
    if budget.delta + mechanism.delta >= privacy.all_delta:
        raise BudgetError(
            f"The privacy budget of this site is spent: the deltas of all runs must stay below "
            f"{privacy.all_delta:.3g}, earlier runs were charged {budget.delta:.3g}, and this one "
            f"needs {mechanism.delta:.3g}."
        )


@dataclass(frozen=True)
class Visiting:
    """A private visit that is to be charged."""

    run: str
    digest: str
    """Of the request."""
    round: int
    mechanism: Mechanism
    """As fixed at the roll call."""


def known_key(state: SiteState, run: str, digest: str) -> bytes | None:
    """Return the key of the coins of a request that was charged, but not answered."""
    with readable("its table of coins"):
        row = state.table.execute(
            "select key from coins where run = ? and digest = ?", (run, digest)
        ).fetchone()
    return bytes(row[0]) if row else None


def check_visit(budget: Budget, run: str) -> None:
    """Raise `BudgetError` if a run has had all of its visits."""
    charged = budget.runs.get(run)
    if charged is not None and not charged.visits_left:
        raise BudgetError(
            f"The privacy budget of this site for this run is spent: {charged.mechanism.visits} "
            f"visits, epsilon {charged.epsilon:.3g}. It trains no more in it."
        )


def charge(site: SiteFile, state: SiteState, visit: Visiting) -> bytes:
    """Charge a visit, within a transaction, and return the key of its coins.

    The same request, after a crash, is not charged again and gets the same key: nothing that was
    made with it has left the site, since it is deleted when the reply is cached (`answered`).

    Raises
    ------
    PolicyError
        If the budget is in doubt, spent or not started.
    """
    budget = read(site, state)
    if (key := known_key(state, visit.run, visit.digest)) is not None:
        return key
    check_visit(budget, visit.run)
    charged_run = budget.runs.get(visit.run)
    if charged_run is not None and charged_run.mechanism != visit.mechanism:
        raise PolicyError(
            "Another process has charged this run with other noise meanwhile: two agents share "
            f"{site.agent.state}. Stop one of them."
        )
    check_started(site)
    common = {"time": utc_text(), "run": visit.run}
    number, last = budget.lines, budget.sha256
    if visit.run not in budget.runs:
        epsilon = epsilon_of(visit.mechanism)
        check_run(site.privacy, budget, visit.mechanism, epsilon)
        charged = {
            "kind": RUN,
            "epsilon": epsilon,
            "unit-column": site.privacy.unit_column,
            "accountant": accountant_name(),
            "mechanism": asdict(visit.mechanism),
        }
        number, last = _append(state, number, last, {**common, **charged})
    _append(
        state,
        number,
        last,
        {**common, "kind": VISIT, "round": visit.round, "request": visit.digest},
    )
    key = secrets.token_bytes(KEY_BYTES)
    values = (visit.run, visit.digest, key)
    with readable("its table of coins"):
        state.table.execute("insert into coins values (?, ?, ?)", values)
    return key


def _append(
    state: SiteState, number: int, previous: str, entry: Mapping[str, Any]
) -> tuple[int, str]:
    text = json.dumps({"previous": previous, **entry})
    sha256 = _sha256(text)
    state.table.execute("insert into budget values (?, ?, ?)", (number + 1, text, sha256))
    return number + 1, sha256


def _sha256(entry: str) -> str:
    return hashlib.sha256(entry.encode()).hexdigest()


def note_sequence(site: SiteFile, state: SiteState) -> None:
    """Write the number of the last charge, once its transaction is on disk.

    Raises
    ------
    ConfigError
        If the file cannot be written: then nothing is trained.
    """
    row = state.table.execute(
        "select number, sha256 from budget order by number desc limit 1"
    ).fetchone()
    write_sequence(sequence_file(site), int(row[0]), str(row[1]))


def answered(table: sqlite3.Connection, run: str, digest: str) -> None:
    """Delete the key of a visit's coins, in the transaction that caches its reply.

    Raises
    ------
    PolicyError
        If it is gone: another process has answered the same request with the same coins. Two
        replies with the same noise, made of data that changed in between, would differ by them.
    """
    with readable("its table of coins"):
        gone = table.execute("delete from coins where run = ? and digest = ?", (run, digest))
    if gone.rowcount != 1:
        raise PolicyError("Another process has answered this request meanwhile.")
