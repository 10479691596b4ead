"""Asks a site's custody as a server would, without a run around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from grandrounds.config import recipes
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from tests.runs import Settings


@cache
def _flat(settings: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return dict(recipes.resolve(dict(settings)).flat())


@contextmanager
def made_up() -> Iterator[None]:
    """Let a site take messages whose learning rate and tensors are of no run."""
    with (
        patch.object(custody.policy, "check_instruction"),
        patch.object(custody, "check_received"),
    ):
        yield


@dataclass
class Asking:
    """Requests to one site, answered by a function that notes the visit instead of training.

    Learning rate and tensors are made up, so these two are not checked (`tests/site/custody/
    test_policy.py` and `test_received.py`); `answer` alone checks everything.
    """

    site: SiteFile
    settings: Settings
    visits: list[Visit] = field(default_factory=list)
    """The visits that were begun."""

    def note(self, visit: Visit) -> RecordDict:
        """Answer a visit by its number."""
        self.visits.append(visit)
        visit.write_cursor()
        return messages.content(
            arrays=ArrayRecord({"change": Array(np.full(3, len(self.visits), np.float32))}),
            metrics={"seconds": 1.0},
            config={"told": "x"},
        )

    def __call__(
        self,
        run: str = "ab",
        number: int = 1,
        kind: str = "train",
        function: Callable[[Visit], RecordDict] | None = None,
        **changes: Any,
    ) -> Message:
        """Return the site's reply.

        Parameters
        ----------
        changes
            `said`: more of the instruction; `sent`: a number in the tensor; `settings`: more of the
            run's configuration.
        """
        said = {"round": number, "run": run, "learning-rate": 1e-3, "cursor": 0}
        sent = np.full((2, 2), changes.get("sent", 0), np.float32)
        content = messages.content(
            arrays=None if kind == "query" else ArrayRecord({"adapter": Array(sent)}),
            config={**said, **changes.get("said", {})},
        )
        settings = {**self.settings, **changes.get("settings", {})}
        with made_up():
            return self.answer(Message(content, 1, kind), settings, function or self.note)

    def answer(
        self, message: Message, settings: Settings, function: Callable[[Visit], RecordDict]
    ) -> Message:
        """Return the site's reply to a message."""
        flat = _flat(tuple(sorted(settings.items())))
        context = Context(1, 1, {SITE: str(self.site.path)}, RecordDict(), flat)
        return custody.answer(self.site.path, message, context, function)

    def chosen(self) -> list[tuple[int, ...]]:
        """Return the examples of each visit."""
        return [visit.chosen.indices if visit.chosen else () for visit in self.visits]
