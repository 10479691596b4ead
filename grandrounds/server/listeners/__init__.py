"""What a run tells while it goes on: one method for each event, each doing nothing by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

Facts = Mapping[str, Any]


class Listener:
    """Told of a run as it goes; a context manager that lasts as long as the run."""

    def __init_subclass__(cls) -> None:
        """Refuse a method for an event that there is none of."""
        events = {name for name in vars(Listener) if name.startswith("on_")}
        unknown = {name for name in vars(cls) if name.startswith("on_")} - events
        if unknown:
            raise TypeError(f"{cls.__name__}: no such event: {', '.join(sorted(unknown))}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End with the run, however it ended."""

    def on_plan(self, plan: Facts) -> None:
        """Take plan.json with `directory` and `resumed-after` (None for a new run)."""

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Take the introductions of the sites that take part, as in sites.json."""

    def on_reply(self, site: int, failure: str | None) -> None:
        """Take a client update of the round in progress; `failure` says why it is not used."""

    def on_round(self, record: Facts) -> None:
        """Take a finished round's line of metrics.jsonl."""

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Take the folder of a new PEFT checkpoint."""

    def on_finished(self, summary: Facts) -> None:
        """Take summary.json of a completed run with its `directory`."""
