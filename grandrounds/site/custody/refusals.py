"""Refusals are counted, and beyond a number of them the site answers without work or log line.

Otherwise refused messages would cost a site its time and disk. Runs in progress, and those that the
operator allowed by their key, are counted each by itself, all others together, so that refusals of
strangers do not close the site to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grandrounds.errors import ThrottledError
from grandrounds.site.custody import audit
from grandrounds.site.custody.quota import is_counted_alone
from grandrounds.site.custody.state import SiteState

MOST = 20
"""Refused or failed messages that are answered in a window."""

WINDOW_SECONDS = 600.0
"""Length of a window, which begins with a refusal."""

TOLD = (
    f"This site has refused {MOST} messages within {WINDOW_SECONDS / 60:.0f} minutes and reads no "
    "more of them until these are over; its audit log says why."
)


def check(state: SiteState, run: str) -> None:
    """Raise `ThrottledError` if the window of a run's refusals is full.

    Once a window is over, its first message writes one line for all that were not logged.
    """
    bucket = _bucket(state, run)
    row = state.table.execute(
        "select since, refused, unlogged from refusals where bucket = ?", (bucket,)
    ).fetchone()
    if row is None:
        return
    since, refused, unlogged = row
    if state.now() - since >= WINDOW_SECONDS:
        state.table.execute("delete from refusals where bucket = ?", (bucket,))
        if unlogged:
            summary = {"run": bucket, "asked": "", "outcome": "throttled", "messages": unlogged}
            audit.write(state.folder, summary)
        return
    if refused >= MOST:
        state.table.execute(
            "update refusals set unlogged = unlogged + 1 where bucket = ?", (bucket,)
        )
        raise ThrottledError(TOLD)


def record(state: SiteState, run: str, line: Mapping[str, Any]) -> None:
    """Count a refusal, and write its line to the audit log."""
    audit.write(state.folder, line)
    state.table.execute(
        "insert into refusals values (?, ?, 1, 0) "
        "on conflict (bucket) do update set refused = refused + 1",
        (_bucket(state, run), state.now()),
    )


def recorded(state: SiteState, run: str, line: Mapping[str, Any]) -> bool:
    """Record a refusal unless the window is full; return whether its line was written."""
    try:
        check(state, run)
    except ThrottledError:
        return False
    record(state, run, line)
    return True


def _bucket(state: SiteState, run: str) -> str:
    return run if run and is_counted_alone(state, run) else ""
