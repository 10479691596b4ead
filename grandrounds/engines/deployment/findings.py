"""What `grandrounds site check` finds, one line each."""

from __future__ import annotations

from dataclasses import dataclass

SOON_DAYS = 30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: str
    """`ok`, `warning` or `error`."""
    subject: str
    """What was checked."""
    text: str
    """What was found, and what to do."""


def validity(subject: str, what: str, days: float) -> Finding:
    """Return whether a key or certificate is valid, and for how long."""
    if days < 0:
        return Finding("error", subject, f"the {what} expired {-days:.0f} days ago: renew it")
    level = "warning" if days < SOON_DAYS else "ok"
    return Finding(level, subject, f"the {what} is valid for {days:.0f} more days")
