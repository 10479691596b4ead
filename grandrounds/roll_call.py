"""The roll call: every site says what it holds; differences are named before anybody trains."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from grandrounds import messages
from grandrounds.errors import EngineError, ReplyError
from grandrounds.exchange import POLL_SECONDS, exchange

CONNECT_SECONDS = 60.0
"""How long the server waits for all sites before the roll call."""


@dataclass(frozen=True)
class SiteCard:
    """What a site said at roll call."""

    node_id: int
    """Flower's id of the node, drawn at random by its engines."""
    facts: Mapping[str, Any]
    """The introduction: partition-id, counts of rows and examples, versions, hashes."""

    @property
    def num_examples(self) -> int:
        """Examples that the site trains on."""
        return int(self.facts["train-examples"])


def wait_for_nodes(grid: Grid, num_partitions: int, seconds: float = CONNECT_SECONDS) -> list[int]:
    """Return the ids of the connected nodes, once there are as many as sites.

    Raises
    ------
    EngineError
        If there are fewer after `seconds`, or more.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < num_partitions:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if len(nodes) != num_partitions:
        raise EngineError(
            f"{len(nodes)} nodes are connected, but data.num-partitions = {num_partitions}. "
            f"With flwr run, add --federation-config 'num-supernodes={num_partitions}', or set "
            f"data.num-partitions = {len(nodes)}."
        )
    return nodes


def roll_call(
    grid: Grid,
    nodes: Sequence[int],
    timeout_seconds: float,
    required: Collection[str] = messages.IDENTITY,
) -> dict[int, SiteCard]:
    """Ask every node who it is; return the sites by partition id.

    Parameters
    ----------
    required
        What every site must say of itself.

    Raises
    ------
    GrandRoundsError
        The first site's own error, if one cannot take part; `EngineError` if two sites differ in
        what must be the same, or one does not answer.
    """
    outgoing = {
        node: Message(messages.content(config={"round": 0}), node, MessageType.QUERY, group_id="0")
        for node in nodes
    }
    cards: dict[int, SiteCard] = {}
    for node, reply in exchange(grid, outgoing, timeout_seconds):
        messages.raise_failure(reply)
        facts = introduction_of(node, reply, required, len(nodes))
        partition = facts["partition-id"]
        if partition in cards:
            raise EngineError(f"Two nodes say that they are site {partition}; each needs its own.")
        cards[partition] = SiteCard(node, facts)
    if len(cards) < len(nodes):
        missing = sorted(set(nodes) - {card.node_id for card in cards.values()})
        raise EngineError(
            f"{len(missing)} of {len(nodes)} nodes did not answer the roll call within "
            f"{timeout_seconds:g} s: {missing[:5]}. Look at their logs, then start again."
        )
    check_same(cards)
    return dict(sorted(cards.items()))


COUNTS = (
    "rows",
    "empty-rows",
    "duplicate-rows",
    "truncated",
    "unlearnable",
    "held-out-examples",
    "threads",
)
"""Facts that are whole numbers from 0 on."""


def introduction_of(
    node: int, reply: Message, required: Collection[str], num_sites: int
) -> dict[str, Any]:
    """Return what a site says of itself; raise `EngineError` if something is missing or wrong."""
    record = dict(reply.content.config_records.get(messages.CONFIG) or {})
    if missing := [fact for fact in required if fact not in record]:
        raise EngineError(
            f"Node {node} does not say its {', '.join(missing)} at roll call: is another version "
            "of grandrounds installed there? Install the same one everywhere."
        )
    facts = ConfigRecord(record)
    try:
        messages.whole_number(facts, "partition-id", 0, num_sites - 1)
        messages.whole_number(facts, "train-examples", 1)
        for name in COUNTS:
            if name in record:
                messages.whole_number(facts, name)
    except ReplyError as error:
        raise EngineError(f"Node {node} introduces itself wrongly: {error}.") from error
    return record


def check_same(cards: Mapping[int, SiteCard]) -> None:
    """Raise `EngineError` naming the sites that differ in version, base or prompt."""
    first = min(cards)
    for fact, meaning in (
        ("version", "version of grandrounds"),
        ("base", "base model"),
        ("prompt", "prompt"),
    ):
        expected = cards[first].facts[fact]
        other = [p for p, card in cards.items() if card.facts[fact] != expected]
        if other:
            raise EngineError(
                f"The sites do not have the same {meaning}: site {first} has {expected}, "
                f"site {other[0]} has {cards[other[0]].facts[fact]} "
                f"({len(other)} of {len(cards)} sites differ). Give all of them the same one."
            )
