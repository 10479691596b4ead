"""The five exchanges of a masked round, from the server: one message to each site in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MessageType

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.errors import ReplyError, RoundError
from grandrounds.server.exchange import Exchange, Tally
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.wire import messages
from grandrounds.wire.adapter import Shapes, count_parameters
from grandrounds.wire.downlink import Parcel
from grandrounds.wire.masks.attempt import CONFIRM, KEYS, MASKED, MASKS, SHARES, UNMASK, Attempt
from grandrounds.wire.masks.carried import (
    ATTEMPT,
    MOST_WEIGHT,
    RECIPE,
    carried,
    received_digest,
    sent,
)
from grandrounds.wire.masks.fixed_point import Sum, numbers_of
from grandrounds.wire.masks.roster import Roster
from grandrounds.wire.names import SiteNames

FIRST_ATTEMPT = 0

MASKED_KIND = f"{MessageType.TRAIN}.{MASKED}"


@dataclass(frozen=True)
class Asked:
    """A round's request to train, and what its sum is made of."""

    outgoing: Mapping[int, Message]
    """Partition id → message with adapter and instruction."""
    learning_rate: float
    shapes: Shapes
    """The tensors of a change."""
    most_weight: int
    """Largest weight of a site."""
    roster: Roster


def instruction(config: Config, most_weight: int) -> dict[str, int | str]:
    """Return what a request to train says besides, for a masked sum."""
    return {ATTEMPT: FIRST_ATTEMPT, MOST_WEIGHT: most_weight, RECIPE: recipe_sha256(config)}


def summed(
    config: Config,
    exchange: Exchange,
    asked: Asked,
    on_reply: Callable[[int, str | None], None],
    names: SiteNames,
) -> tuple[Tally, Sum]:
    """Let the sites of a round train and add up; return their outcomes and the sum.

    Sites that fail before their vectors are in the sum have failed; later ones are survivors.

    Raises
    ------
    RoundError
        If too few sites take part for the masks to be removed, or what is left is no sum; with all
        failures.
    """
    first = next(iter(asked.outgoing.values()))
    number = int(messages.instruction_of(first.content)["round"])  # type: ignore[arg-type]
    roster = asked.roster
    attempt = Attempt(exchange.run, number, FIRST_ATTEMPT, roster.digest)
    values = count_parameters(asked.shapes)
    numbers = numbers_of(
        config, asked.learning_rate, len(asked.outgoing), values, asked.most_weight
    )
    collected = MaskedSum(attempt, roster, numbers, received_digest(first.content))
    nodes = {site: message.metadata.dst_node_id for site, message in asked.outgoing.items()}
    failed: dict[int, str] = {}

    def each(kind: str, request: bytes, take: Callable[[int, bytes], None]) -> None:
        """Play one of the four exchanges that carry no adapter."""
        parcel = Parcel(sent(kind, request) if request else None, {}, {})
        outgoing = {
            site: exchange.message(
                node, f"{MessageType.TRAIN}.{kind}", number, parcel, {ATTEMPT: FIRST_ATTEMPT}
            )
            for site, node in nodes.items()
            if site not in failed
        }

        def use(site: int, reply: Message) -> messages.Metrics:
            take(site, carried(reply.content, kind))
            return {}

        failed.update(exchange.ask(MASKS, outgoing, use).failed)

    def use_vector(site: int, reply: Message) -> messages.Metrics:
        metrics = messages.metrics_of(reply)
        vector = carried(reply.content, MASKED, collected.numbers.size_bytes)
        collected.take_masked(site, np.frombuffer(vector, dtype=np.uint8))
        return metrics

    try:
        each(KEYS, b"", collected.take_keys)
        each(SHARES, collected.key_list(), collected.take_shares)
        linked = collected.linked()
        for site in linked:
            asked.outgoing[site].content[MASKS] = sent(MASKED, collected.boxes(site))
        for site in failed:
            on_reply(site, failed[site])
        tally = exchange.ask(
            MessageType.TRAIN, {site: asked.outgoing[site] for site in linked}, use_vector, on_reply
        )
        tally.failed |= failed
        failed.update(tally.failed)
        survivors = collected.survivors()
        each(CONFIRM, survivors, collected.take_signature)
        each(UNMASK, collected.signatures(), collected.take_opened)
        return tally, collected.numbers.decode(collected.total())
    except (RoundError, ReplyError) as error:
        raise RoundError(f"{error} {Tally(failed=failed).reasons(names)}".rstrip()) from error
