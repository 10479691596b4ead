"""Estimates when a run ends, from its rounds and, until the first is finished, from its steps."""

from __future__ import annotations

import time
from collections.abc import Callable

SMALLEST_SHARE = 0.1
"""Share of a first round below which nothing is estimated: the base is loaded in its first step."""


def time_text(seconds: float) -> str:
    """Return `42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Clock:
    """Seconds left of a run, as its rounds pass."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        """Start with the first round of `total`."""
        self._total, self._now = total, now
        self._seconds: list[float] = []
        self._done = 0
        self._share = 0.0
        self._began = now()
        self._end: float | None = None

    @property
    def done(self) -> float:
        """Rounds done, the present one in part."""
        return self._done + self._share

    def begins(self, done: int) -> None:
        """Take note that a round begins after `done` others: at the start, or on resume."""
        self._done, self._share, self._began = done, 0.0, self._now()

    def within(self, share: float) -> None:
        """Take note that this share of the present round is done, from 0 to 1."""
        self._share = max(self._share, min(share, 1.0))
        if not self._seconds and self._share >= SMALLEST_SHARE:
            round_seconds = (self._now() - self._began) / self._share
            self._estimate(round_seconds)

    def finished(self, number: int, seconds: float) -> None:
        """Take note of a finished round of training, and of how long it took."""
        self._seconds.append(seconds)
        self.begins(number)
        if number < self._total:
            self._estimate(sum(self._seconds) / len(self._seconds))
        else:  # what follows is no round
            self._end = None

    def expect(self, seconds: float) -> None:
        """Take note of how long the rest takes, where that is known otherwise."""
        self._end = self._now() + seconds

    def _estimate(self, round_seconds: float) -> None:
        self._end = self._now() + round_seconds * (self._total - self.done)

    @property
    def left(self) -> float | None:
        """Seconds until the last round ends; None while there is nothing to estimate from."""
        return None if self._end is None else max(0.0, self._end - self._now())
