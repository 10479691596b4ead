"""The roll call: every site says what it holds; differences are named before anybody trains."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from grandrounds.errors import EngineError, GrandRoundsError, ReplyError
from grandrounds.server.exchange import exchange, pause
from grandrounds.wire import messages


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


def wait_for_nodes(
    grid: Grid,
    num_partitions: int,
    seconds: float = 60.0,
    least: int | None = None,
    site_nodes: Mapping[int, int] | None = None,
) -> list[int]:
    """Return the ids of the connected nodes, once there are as many as sites.

    Parameters
    ----------
    least : int or None
        With so many a run begins after `seconds`, and the others may come later; None: all.
    site_nodes
        Partition id → the node that it was admitted as, where it is known.

    Raises
    ------
    EngineError
        If there are fewer after `seconds`, or more than sites.
    """
    least = num_partitions if least is None else least
    started = time.monotonic()
    while len(nodes := sorted(grid.get_node_ids())) < num_partitions:
        if (waited := time.monotonic() - started) > seconds:
            break
        time.sleep(pause(waited))
    if not least <= len(nodes) <= num_partitions:
        fewer = least < num_partitions and f" (strategy.min-sites = {least})"
        told = (
            f"{len(nodes)} nodes are connected, but data.num-partitions = "
            f"{num_partitions}{fewer or ''}"
        )
        advice = (
            "start their SuperNodes, wait longer (strategy.connect-timeout-seconds), or let a run "
            "begin without some (strategy.min-sites)."
        )
        if missing := [str(p) for p, node in (site_nodes or {}).items() if node not in nodes]:
            raise EngineError(f"{told}. Not there: sites {', '.join(missing)}; {advice}")
        raise EngineError(
            f"{told}. With flwr run, add --federation-config 'num-supernodes={num_partitions}', or "
            f"set data.num-partitions = {len(nodes)}. Real sites: {advice}"
        )
    return nodes


def roll_call(
    grid: Grid,
    nodes: Sequence[int],
    timeout_seconds: float,
    required: Collection[str] = messages.IDENTITY,
    *,
    num_sites: int | None = None,
    run: str = "0",
    least: int | None = None,
    refused: dict[int, str] | None = None,
    site_nodes: Mapping[int, int] | None = None,
) -> dict[int, SiteCard]:
    """Ask every node who it is; return the sites by partition id.

    Parameters
    ----------
    required
        What every site must say of itself.
    num_sites : int or None
        Sites of the run; None: as many as nodes.
    run : str
        The run's key.
    least : int or None
        With so many sites a run begins without those that cannot take part; None: all must.
    refused
        Takes node id → why it cannot take part.
    site_nodes
        Partition id → the node that it was admitted as, where it is known.

    Raises
    ------
    GrandRoundsError
        The first error, a site's own or of its introduction, if one too many cannot take part;
        `EngineError` if two sites differ in what must be the same, or one does not answer.
    """
    cards: dict[int, SiteCard] = {}
    refused = {} if refused is None else refused
    for node, reply in exchange(grid, questions(nodes, run), timeout_seconds):
        try:
            messages.raise_failure(reply)
            facts = introduction_of(node, reply, required, num_sites or len(nodes))
            partition = facts["partition-id"]
            if told := another(partition, node, site_nodes or {}):
                raise EngineError(f"{told[0].upper()}{told[1:]}.")
            if partition in cards:
                raise EngineError(
                    f"Two nodes say that they are site {partition}; each needs its own."
                )
        except GrandRoundsError as error:
            refused[node] = str(error)
            if least is None or len(nodes) - len(refused) < least:
                raise
            continue
        cards[partition] = SiteCard(node, facts)
    silent = set(nodes) - refused.keys() - {card.node_id for card in cards.values()}
    if silent and least is not None and len(cards) >= least:
        refused |= dict.fromkeys(silent, f"no answer within {timeout_seconds:g} s")
    elif silent:
        missing = sorted(silent)
        raise EngineError(
            f"{len(missing)} of {len(nodes)} nodes did not answer the roll call within "
            f"{timeout_seconds:g} s: {missing[:5]}. Look at their logs, then start again."
        )
    check_same(cards)
    return dict(sorted(cards.items()))


def questions(nodes: Sequence[int], run: str) -> dict[int, Message]:
    """Return the message that asks each node who it is."""
    return {
        node: Message(
            messages.content(config={"round": 0, messages.RUN: run}),
            node,
            MessageType.QUERY,
            group_id="0",
        )
        for node in nodes
    }


REFRESH_SECONDS = 60.0
"""Most time before a round for sites that came or came back to say who they are."""

SAME_IN_A_RUN = ("version", "base", "prompt", "train-examples", "held-out-examples")
"""What a site that comes back must still be."""


def refresh(
    grid: Grid,
    cards: dict[int, SiteCard],
    num_sites: int,
    suspected: Collection[int],
    timeout_seconds: float,
    run: str,
    required: Collection[str] = messages.IDENTITY,
    *,
    introduced: Mapping[int, Mapping[str, Any]] | None = None,
    site_nodes: Mapping[int, int] | None = None,
) -> dict[int, str]:
    """Let sites that came, or whose last reply failed, say who they are; renew their cards.

    Parameters
    ----------
    cards
        Partition id → what a site said last. A site that is not what it was loses its card.
    suspected
        Partition ids whose last reply failed.
    introduced
        Partition id → what a site said when it was there first, of all that ever were; None: of
        those that have a card.
    site_nodes
        Partition id → the node that it was admitted as, where it is known.

    Returns
    -------
    dict
        Partition id, or -1 where it is not known, → why a site cannot take part.
    """
    known = {card.node_id: partition for partition, card in cards.items()}
    before = {p: c.facts for p, c in cards.items()} if introduced is None else introduced
    connected = set(grid.get_node_ids())
    asked = sorted(node for node in connected if node not in known or known[node] in suspected)
    refused: dict[int, str] = {}
    seconds = min(timeout_seconds, REFRESH_SECONDS)
    for node, reply in exchange(grid, questions(asked, run), seconds):
        partition = known.get(node, -1)
        try:
            messages.raise_failure(reply)
        except GrandRoundsError as error:  # it may answer the next message
            refused[partition] = str(error)
            continue
        try:
            facts = introduction_of(node, reply, required, num_sites)
            partition = int(facts["partition-id"])
            if told := another(partition, node, site_nodes or {}):
                refused[-1] = told
                continue
            holder = cards[partition].node_id if partition in cards else node
            if holder != node and holder in connected:
                refused[-1] = (
                    f"node {node} says that it is site {partition}, and so does node {holder}, "
                    "which is connected; each needs its own"
                )
                continue
            check_still_same(partition, facts, before.get(partition, facts), cards)
        except GrandRoundsError as error:
            refused[partition] = str(error)
            cards.pop(partition, None)
            continue
        cards[partition] = SiteCard(node, facts)
    return refused


def another(partition: int, node: int, site_nodes: Mapping[int, int]) -> str:
    """Return why a node cannot be the site that it says it is; empty if it can."""
    admitted = site_nodes.get(partition, node)
    if admitted != node:
        return (
            f"node {node} says that it is site {partition}, which node {admitted} was admitted as"
        )
    for other, its_node in site_nodes.items():
        if its_node == node and other != partition:
            return f"node {node} says that it is site {partition}, and was admitted as site {other}"
    return ""


def check_still_same(
    partition: int,
    facts: Mapping[str, Any],
    before: Mapping[str, Any],
    cards: Mapping[int, SiteCard],
) -> None:
    """Raise `EngineError` if a site that comes back is not what it was, or not like the others."""
    for fact in SAME_IN_A_RUN:
        if facts.get(fact) != before.get(fact):
            raise EngineError(
                f"it came back with another {fact}: {facts.get(fact)}, and was "
                f"{before.get(fact)}. Restore it, or start a new run."
            )
    check_same({**cards, partition: SiteCard(-1, facts)})


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


MOST_CHARACTERS = 1000
"""Of a text at roll call."""


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
    for name, value in record.items():
        is_short = not isinstance(value, str) or len(value) <= MOST_CHARACTERS
        if not isinstance(value, bool | int | float | str) or not is_short:
            raise EngineError(
                f"Node {node} introduces itself wrongly: its {name[:40]!r} is no number, and no "
                f"text of at most {MOST_CHARACTERS} characters."
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
    for fact, meaning in (
        ("version", "version of grandrounds"),
        ("base", "base model"),
        ("base-content", "base model, whose files differ"),
        ("prompt", "prompt"),
    ):
        those = {p: card for p, card in cards.items() if fact in card.facts}  # agents say more
        if not those:
            continue
        first = min(those)
        expected = those[first].facts[fact]
        other = [p for p, card in those.items() if card.facts[fact] != expected]
        if other:
            raise EngineError(
                f"The sites do not have the same {meaning}: site {first} has {expected}, "
                f"site {other[0]} has {cards[other[0]].facts[fact]} "
                f"({len(other)} of {len(cards)} sites differ). Give all of them the same one."
            )
