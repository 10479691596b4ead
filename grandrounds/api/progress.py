"""Progress of comparisons and evaluations as lines of text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class Clock:
    """Counts finished work in training examples, and estimates the time left from it."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.units = self.done = 0
        self.planned = self.work = self._finished = 0.0
        self._has_trained = False  # loading the base says nothing about the time of the rest

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Count one event."""
        if event == "planned":
            self.started = time.monotonic()
            self.units, self.done, self.planned = facts["units"], facts["kept"], facts["work"]
        elif event == "visited":
            self.work += facts["count"]
            self._has_trained = self._has_trained or facts["count"] > 0
        else:
            self.done += 1
            self._finished += facts["work"]
            self.work = self._finished  # as planned, including what failed or was resumed

    def left(self) -> str:
        """Return `about 3 min left`; empty while there is nothing to estimate from."""
        if not self._has_trained or self.work >= self.planned:
            return ""
        spent = time.monotonic() - self.started
        seconds = spent * (self.planned - self.work) / self.work
        return (
            f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
        )


def comparison_line(event: str, facts: Mapping[str, Any], clock: Clock) -> str:
    """Return the line for an event; empty if it only moves the bar."""
    if event == "planned":
        kept = f", {facts['kept']} finished before" if facts["kept"] else ""
        return f"comparison in {facts['directory']}: {facts['units']} parts{kept}"
    if event == "visited":
        return ""
    parts = [f"{clock.done}/{clock.units}  {facts['unit']}: loss {facts['held-out-loss']:.3f}"]
    parts += [f"{name} {100 * right:.1f} %" for name, right in facts["accuracy"].items()]
    parts += [f"{facts['seconds']:.1f} s", clock.left()]
    return "  ".join(part for part in parts if part)


def evaluation_line(event: str, facts: Mapping[str, Any]) -> str:
    """Return the line for an event of an evaluation; empty if it has none."""
    if event == "forecast" and facts["seconds"]:
        from grandrounds.server.listeners.clock import time_text

        about = time_text(facts["seconds"])
        return f"about {about} to go, from the first batch of each benchmark"
    if event != "asked":
        return ""
    cut = f", {facts['truncated']:,} prompts truncated" if facts["truncated"] else ""
    kept = f", {facts['done']:,} kept from before" if facts["done"] else ""
    what = f"{facts['protocol']}  {facts['model']}  {facts['benchmark']}"
    return f"{what}: {facts['asked']:,} asked{kept}{cut}"
