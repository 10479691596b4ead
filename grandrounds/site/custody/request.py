"""A message to a site's custody, as far as it can be read without work."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType

from grandrounds.errors import ReplyError
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.visit import MOST_ROUNDS
from grandrounds.wire import messages
from grandrounds.wire.masks.attempt import KIND_OF, MASKED_KIND
from grandrounds.wire.personal import PERSONAL

RUN_KEY = re.compile(r"[0-9a-f]{1,32}")

TRAINING = (MessageType.TRAIN, MASKED_KIND)
"""Kinds of messages for which a site trains."""

EXCHANGED = tuple(kind for kind in KIND_OF.values() if kind != MASKED_KIND)
"""Kinds of the exchanges of a masked sum for which it does not."""


def is_visit(kind: str) -> bool:
    """Whether a kind of message makes a site train or evaluate."""
    return kind not in ("query", messages.MAGNITUDES, *EXCHANGED)


@dataclass
class Request:
    """One message, the site that it is for, and the line of the audit log that it leaves."""

    site: SiteFile
    """The site's file, read for this message."""
    state: SiteState
    """The site's state, open."""
    message: Message
    """What the server sent."""
    context: Context
    """Flower's context; its `run_config` is the run's configuration, not yet resolved."""
    entry: dict[str, Any] = field(default_factory=dict)
    """The audit log's line; each step adds what it learns."""
    mechanism: Mechanism | None = None
    """Of a private run, as the site has fixed it."""
    is_private: bool = False
    """Whether the run's visits are private."""
    end: SiteEnd | None = None
    """The site's end of the run's masked sums; None: updates travel plain."""
    touched: bool = False
    """Whether the site's data were read for it: from then on a private run learns of a failure only
    that there was one."""
    started: float = field(default_factory=time.monotonic)
    """When it came, by `time.monotonic()`."""

    def __post_init__(self) -> None:
        self.entry |= _question(self.message, self.context)

    @property
    def kind(self) -> str:
        """The message's type: a key of `client_app.VISITS`."""
        return self.message.metadata.message_type

    @property
    def is_visit(self) -> bool:
        """Whether it trains or evaluates; otherwise it asks who the site is, or of its base, or is
        an exchange of masks."""
        return is_visit(self.kind)

    @property
    def trains(self) -> bool:
        """Whether the site trains for it."""
        return self.kind in TRAINING

    @property
    def personalises(self) -> bool:
        """Whether the site makes its personal adapter for it, which stays here."""
        return self.kind == PERSONAL

    @property
    def is_exchange(self) -> bool:
        """Whether it is one of the four exchanges of a masked sum without training."""
        return self.kind in EXCHANGED

    @property
    def instruction(self) -> ConfigRecord:
        """The server's instruction that comes with the tensors."""
        return messages.instruction_of(self.message.content)

    @property
    def round(self) -> int:
        """The round, for counters; 0 if it is missing, no integer or negative."""
        return min(max(int(self.entry["round"]), 0), MOST_ROUNDS)

    @cached_property
    def run(self) -> str:
        """The key by which a site identifies a run; a resume keeps it.

        Raises
        ------
        ReplyError
            If it is missing or malformed.
        """
        key = self.instruction.get(messages.RUN)
        if not isinstance(key, str) or not RUN_KEY.fullmatch(key):
            raise ReplyError(f"run is {str(key)[:40]!r}, not a key of up to 32 hex digits")
        return key


def _question(message: Message, context: Context) -> dict[str, Any]:
    """Return the audit log's entry for a message, before it is processed."""
    record: Mapping[str, Any] = messages.instruction_of(message.content)
    number = record.get("round")
    return {
        "run": str(record.get(messages.RUN, ""))[:40],
        "flower-run": str(context.run_id),
        "round": number if isinstance(number, int) else 0,
        "asked": message.metadata.message_type,
        **{name: _number(record[name]) for name in ("cursor", "learning-rate") if name in record},
        "bytes-in": sum(size for _, size in messages.tensor_sizes(message)),
    }


def _number(value: object) -> object:
    """Return a number; anything else as its repr, shortened."""
    return value if isinstance(value, int | float) else repr(value)[:40]
