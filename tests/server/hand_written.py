"""Small sites written by hand, and a run over them, for the tests of the round loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
from flwr.app import Context, Message

from grandrounds.config.recipes import resolve
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import DataError
from grandrounds.model.lora import LoraSpec
from grandrounds.model.targets import Targets
from grandrounds.server.aggregation.make import filled_in, make_rule
from grandrounds.server.exchange import Exchange
from grandrounds.server.introductions import SiteCard
from grandrounds.server.listeners import Listener
from grandrounds.server.roll_call import Roster
from grandrounds.server.run import Run, State
from grandrounds.wire import messages
from grandrounds.wire.adapter import Ranks
from grandrounds.wire.downlink import Sender
from grandrounds.wire.ledger import Ledger

Behaviour = Callable[[Message, int], Message]

SHAPES = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (5, 2)}
START = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}

OF_A_VISIT: dict[str, float | int] = dict.fromkeys(messages.TRAIN_METRICS, 1)


class Sites:
    """A ClientApp by hand: site p has 10 (p + 1) examples and changes every number by p + 1."""

    def __init__(self, special: Mapping[tuple[str, int], Behaviour] | None = None) -> None:
        self.special = dict(special or {})
        self.seen: list[tuple[str, int, dict[str, Any]]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        site = int(context.node_config["partition-id"])
        config = message.content.config_records.get(messages.CONFIG)
        self.seen.append((kind, site, dict(config) if config is not None else {}))
        if (kind, site) in self.special:
            return self.special[kind, site](message, site)
        if kind == "query":
            return introduce(message, site)
        if kind == "train":
            return changed(message, site)
        return Message(
            messages.content(metrics={"nll-sum": 3.0 * (site + 1), "tokens": site + 1}),
            reply_to=message,
        )


class Silent(InProcessGrid):
    """A grid of which some nodes never answer."""

    def __init__(self, sites: Sites, count: int, silent: set[int]) -> None:
        super().__init__(sites, {}, count)
        self.silent = silent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            i
            for i in message_ids
            if i not in self._pending or self._pending[i].metadata.dst_node_id not in self.silent
        )


def introduce(message: Message, site: int, **facts: Any) -> Message:
    said: dict[str, int | str] = {
        **dict.fromkeys(messages.INTRODUCTION, 1),
        "partition-id": site,
        "train-examples": 10 * (site + 1),
        "version": "1",
        "base": "b",
        "prompt": "p",
        "truncated": 1,
        "data-tag": "0a",
    }
    return Message(messages.content(config={**said, **facts}), reply_to=message)


def changed(message: Message, site: int, examples: int | None = None) -> Message:
    change = {name: np.full(shape, site + 1, np.float32) for name, shape in SHAPES.items()}
    count = 10 * (site + 1) if examples is None else examples
    metrics = {**OF_A_VISIT, "num-examples": count}
    return Message(
        messages.content(arrays=messages.to_arrays(change), metrics=metrics), reply_to=message
    )


def crash(message: Message, site: int) -> Message:
    raise RuntimeError(f"site {site} is on fire")


def refuse(message: Message, site: int) -> Message:
    return Message(messages.failure(DataError(f"site {site} has no rows")), reply_to=message)


def grid_of(sites: Callable[[Message, Context], Message], count: int) -> InProcessGrid:
    return InProcessGrid(sites, {}, count)


def cards_of(count: int) -> dict[int, SiteCard]:
    return {
        p: SiteCard(p + 1, {"train-examples": 10 * (p + 1), "threads": 1}) for p in range(count)
    }


def exchange_of(grid: InProcessGrid, seconds: float = 10.0, run: str = "0") -> Exchange:
    return Exchange(grid, Ledger(), run, seconds)


def run_over(
    grid: InProcessGrid,
    listener: Listener | None = None,
    timeout_seconds: float = 10.0,
    **settings: Any,
) -> Run:
    """Return a run over four sites that all are there, after two rounds; nothing is written.

    Weights and norms are limited only where the settings say so.
    """
    unlimited = {"strategy.largest-weight": 0, "defence.largest-norm": 0}
    config = resolve({"strategy.name": "fedprox", **unlimited, **settings})
    state = State(2, START, "0")
    return Run(
        config=config,
        directory=cast(Any, None),
        is_new=True,
        plan=cast(Any, None),
        lora=LoraSpec(2, 4.0, "m", 0.0),
        targets=Targets(("m",)),
        state=state,
        rule=make_rule(filled_in(config)),
        sender=Sender(Ranks.of(config), config.communication, START, 0),
        exchange=Exchange(grid, state.ledger, state.run, timeout_seconds),
        roster=Roster(4, cards=cards_of(4)),
        listener=listener or Listener(),
        evaluation_cohort=[],
    )
