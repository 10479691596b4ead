"""The events of a run: one listener method each, doing nothing by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

Facts = Mapping[str, Any]


class Listener:
    """Receives the events of a run; a context manager that lasts as long as the run."""

    summary: Facts = MappingProxyType({})
    """What `on_finished` received, of a listener that keeps it."""

    def __init_subclass__(cls) -> None:
        """Reject methods for unknown events."""
        events = {name for name in vars(Listener) if name.startswith("on_")}
        unknown = {name for name in vars(cls) if name.startswith("on_")} - events
        if unknown:
            raise TypeError(f"{cls.__name__}: no such event: {', '.join(sorted(unknown))}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        """End with the run, however it ended."""

    def on_plan(self, plan: Facts) -> None:
        """Handle plan.json with `directory`, `resumed-after` (None for a new run) and, where the
        run is played, its key as `run`."""

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Handle the introductions of the participating sites, as in sites.json."""

    def on_step(self, what: str, site: int, done: int, total: int) -> None:
        """Handle a step of a site in this process; `total` is 0 for work without steps.

        `what` is `training`, `held-out loss` or `formulary exam`.
        """

    def on_reply(self, site: int, failure: str | None) -> None:
        """Handle a client update of the current round; `failure` says why it was not used."""

    def on_round(self, record: Facts) -> None:
        """Handle a finished round's line of metrics.jsonl."""

    def on_unfinished(self, line: Facts) -> None:
        """Handle the line of unfinished.jsonl of a round that failed or was interrupted."""

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Handle the folder of a new PEFT checkpoint."""

    def on_finished(self, summary: Facts) -> None:
        """Handle summary.json of a completed run with its `directory`."""
