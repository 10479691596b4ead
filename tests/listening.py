"""A listener that hands every event of a run to one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grandrounds.server.listeners import Facts, Listener

Tell = Callable[[str, Mapping[str, Any]], None]


class Telling(Listener):
    """Calls `tell(event, data)` for each event, after the listener beside it."""

    def __init__(self, tell: Tell, beside: Listener | None = None) -> None:
        self._tell, self._beside = tell, beside or Listener()

    def on_plan(self, plan: Facts) -> None:
        self._beside.on_plan(plan)
        self._tell("plan", plan)

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        self._beside.on_roll_call(sites)
        self._tell("roll-call", {"sites": sites})

    def on_reply(self, site: int, failure: str | None) -> None:
        self._beside.on_reply(site, failure)
        self._tell("reply", {"partition": site, "failure": failure})

    def on_round(self, record: Facts) -> None:
        self._beside.on_round(record)
        self._tell("round", record)

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        self._beside.on_checkpoint(round_number, folder)
        self._tell("checkpoint", {"round": round_number, "path": folder})

    def on_finished(self, summary: Facts) -> None:
        self._beside.on_finished(summary)
        self._tell("finished", summary)
