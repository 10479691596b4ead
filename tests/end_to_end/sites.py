"""Misbehaving sites, and the record of a visit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType

from grandrounds.wire import messages
from tests.runs import GOOD_SITES, Sites


class RecordedVisit(NamedTuple):
    """A training visit, as the fixture `visited` records it."""

    partition: int
    examples: list[Any]
    result: Any


Damage = Callable[[Message, Message], Message]
"""(message, the real reply) → the reply that is sent."""


def spoilt(damage: Damage, partitions: Collection[int], kind: str = MessageType.TRAIN) -> Sites:
    """Return sites of which some send damaged replies to messages of one kind."""

    def sites(message: Message, context: Context) -> Message:
        reply = GOOD_SITES(message, context)
        hit = context.node_config["partition-id"] in partitions
        return damage(message, reply) if hit and message.metadata.message_type == kind else reply

    return sites


def with_updates(change: Callable[[np.ndarray], np.ndarray], partitions: Collection[int]) -> Sites:
    """Return sites of which some change their updates before sending them."""

    def changed(message: Message, reply: Message) -> Message:
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {name: Array(change(array.numpy())) for name, array in record.items()}
        )
        return reply

    return spoilt(changed, partitions)


def fail_from(round_number: int, partitions: Collection[int]) -> Sites:
    """Return sites of which some crash in training from a round on."""

    def sites(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            now = int(message.content.config_records["config"]["round"])
            if now >= round_number and context.node_config["partition-id"] in partitions:
                raise RuntimeError("disk broke")
        return GOOD_SITES(message, context)

    return sites


def answer_without_a_model(held_out_losses: Mapping[int, float]) -> Sites:
    """Return sites that train nothing and report the held-out loss given for each round."""
    no_base = {"base-loads": 0, "process-id": 1}

    def sites(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return GOOD_SITES(message, context)
        round_number = int(message.content.config_records["config"]["round"])
        if kind == MessageType.EVALUATE:
            loss = held_out_losses[round_number]
            judged = {"nll-sum": 10 * loss, "tokens": 10, "num-examples": 2}
            return Message(messages.content(metrics={**judged, **no_base}), reply_to=message)
        received = message.content.array_records["arrays"]
        change = ArrayRecord({n: Array(np.zeros_like(a.numpy())) for n, a in received.items()})
        metrics: dict[str, float | int] = {
            "num-examples": 20,
            "train-loss": 1.0,
            "proximal-penalty": 0.0,
            "examples": 8,
            "tokens": 80,
            "padding-tokens": 0,
            "seconds": 0.0,
            "cursor": 8 * round_number,
            "coverage": 0.5,
            **no_base,
        }
        return Message(messages.content(arrays=change, metrics=metrics), reply_to=message)

    return sites
