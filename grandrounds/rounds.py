"""The round loop: who is asked, what comes back, what becomes of it.

Step 1  roll call: every site says what it holds; differences are named before anybody trains
Step 2  a cohort is drawn by seed and receives the adapter
Step 3  replies are checked, counted and added up as they arrive
Step 4  the new adapter is judged on held-out examples and written down
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from grandrounds import messages
from grandrounds.adapter import Adapter
from grandrounds.aggregation.product_error import ProductError, measured_modules
from grandrounds.aggregation.weighted_mean import LARGEST_WEIGHT, WeightedMean
from grandrounds.errors import EngineError, GrandRoundsError, ReplyError, RoundError
from grandrounds.ledger import Ledger

POLL_SECONDS = 0.05
"""Between two looks for replies; Flower's engines move messages every 0.1 s."""

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


@dataclass
class Tally:
    """What came of one exchange with a cohort."""

    good: dict[int, messages.Metrics] = field(default_factory=dict)
    """Partition id → metrics of a reply that was used."""
    failed: dict[int, str] = field(default_factory=dict)
    """Partition id → why its reply was not used."""


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
        facts = introduction_of(node, reply, required)
        partition = int(facts["partition-id"])
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


def introduction_of(node: int, reply: Message, required: Collection[str]) -> dict[str, Any]:
    """Return what a site says of itself; raise `EngineError` if something is missing."""
    record = dict(reply.content.config_records.get(messages.CONFIG) or {})
    if missing := [fact for fact in required if fact not in record]:
        raise EngineError(
            f"Node {node} does not say its {', '.join(missing)} at roll call: is another version "
            "of grandrounds installed there? Install the same one everywhere."
        )
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


def exchange(
    grid: Grid, outgoing: Mapping[int, Message], timeout_seconds: float
) -> Iterator[tuple[int, Message]]:
    """Send one message per node and yield (node id, reply) as replies arrive.

    Replies are fetched one by one, so that one that waits its turn takes no memory here. Ends when
    all have answered, or after `timeout_seconds` with those who have.
    """
    nodes = list(outgoing)
    message_ids = list(grid.push_messages(outgoing.values()))
    pending = dict(zip(message_ids, nodes, strict=True))
    deadline = time.monotonic() + timeout_seconds
    while pending:
        waiting = len(pending)
        for message_id in list(pending):
            for reply in grid.pull_messages([message_id]):
                yield pending.pop(message_id), reply
        if len(pending) == waiting:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)


def ask_cohort(
    grid: Grid,
    kind: str,
    outgoing: Mapping[int, Message],
    ledger: Ledger,
    timeout_seconds: float,
    use: Callable[[int, Message], messages.Metrics],
    on_reply: Callable[[int, str | None], None],
) -> Tally:
    """Send a cohort its messages; count, check and use each reply as it arrives.

    Parameters
    ----------
    outgoing
        Partition id's message; its destination is the node of that site.
    use
        Called with (partition id, reply); returns its metrics, or raises `GrandRoundsError` for a
        reply that cannot be used, which is then named and counted as failed.
    on_reply
        Called with (partition id, None or the failure), once for every site that was asked.
    """
    partition_of = {m.metadata.dst_node_id: p for p, m in outgoing.items()}
    for message in outgoing.values():
        ledger.count(f"{kind}.down", messages.tensor_sizes(message))
    tally = Tally()
    by_node = {m.metadata.dst_node_id: m for m in outgoing.values()}
    for node, reply in exchange(grid, by_node, timeout_seconds):
        partition = partition_of[node]
        ledger.count(f"{kind}.up", messages.tensor_sizes(reply))
        try:
            messages.raise_failure(reply)
            tally.good[partition] = use(partition, reply)
        except GrandRoundsError as error:
            tally.failed[partition] = str(error)
        on_reply(partition, tally.failed.get(partition))
    for partition in outgoing:
        if partition not in tally.good and partition not in tally.failed:
            tally.failed[partition] = f"no reply within {timeout_seconds:g} s"
            on_reply(partition, tally.failed[partition])
    return tally


def train_round(
    grid: Grid,
    round_number: int,
    adapter: Adapter,
    instructions: Mapping[int, Mapping[str, float | int]],
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    *,
    min_reply_fraction: float,
    timeout_seconds: float,
    on_reply: Callable[[int, str | None], None],
    measure_product_error: bool = False,
    required_metrics: Collection[str] = ("num-examples",),
) -> tuple[Adapter, Tally, dict[str, float]]:
    """Train one cohort; return the new adapter, what came back, and product errors if measured.

    Parameters
    ----------
    instructions
        Partition id → config of its message (learning rate, cursor after a resume). Its keys are
        the cohort.
    required_metrics
        Metrics without which a reply counts as failed.

    Raises
    ------
    RoundError
        If fewer than `min_reply_fraction` of the cohort replied well; each failure is named.
    """
    arrays = messages.to_arrays(adapter)  # one record for all messages
    outgoing = {
        partition: Message(
            messages.content(arrays=arrays, config={"round": round_number, **instruction}),
            cards[partition].node_id,
            MessageType.TRAIN,
            group_id=str(round_number),
        )
        for partition, instruction in instructions.items()
    }
    shapes = {name: tensor.shape for name, tensor in adapter.items()}
    mean = WeightedMean(shapes)
    modules = measured_modules(list(shapes), len(outgoing)) if measure_product_error else []
    product_error = ProductError(adapter, modules)

    def use(partition: int, reply: Message) -> messages.Metrics:
        metrics = messages.metrics_of(reply, required_metrics)
        change = messages.from_arrays(_arrays_of(reply), shapes)
        weight = claimed_examples(metrics, cards[partition])
        mean.add(change, weight)
        product_error.add(change, weight)
        return metrics

    tally = ask_cohort(grid, "train", outgoing, ledger, timeout_seconds, use, on_reply)
    needed = math.ceil(min_reply_fraction * len(outgoing) - 1e-9)
    if len(tally.good) < needed:
        reasons = "; ".join(f"site {p}: {why}" for p, why in sorted(tally.failed.items()))
        raise RoundError(
            f"Round {round_number}: {len(tally.good)} of {len(outgoing)} sites replied well, at "
            f"least {needed} are needed (strategy.min-reply-fraction = {min_reply_fraction:g}). "
            f"{reasons}"
        )
    measured = (
        {
            "product-error": product_error.result(),
            "product-error-of-update": product_error.of_update(),
        }
        if modules
        else {}
    )
    return mean.result(adapter), tally, measured


def claimed_examples(metrics: messages.Metrics, card: SiteCard) -> int:
    """Return a reply's weight: its num-examples, at most what the site said at roll call.

    Raises
    ------
    ReplyError
        If it is not a whole number of at least 1, or too large to be exact.
    """
    claim = metrics.get("num-examples")
    if not isinstance(claim, int) or claim < 1:
        raise ReplyError(f"num-examples is {claim!r}, not a whole number of at least 1")
    weight = min(claim, card.num_examples)
    if weight > LARGEST_WEIGHT:
        raise ReplyError(f"num-examples is {weight}, more than the {LARGEST_WEIGHT} allowed")
    return weight


def _arrays_of(reply: Message) -> ArrayRecord:
    if messages.ARRAYS not in reply.content.array_records:
        raise ReplyError("the reply has no tensors")
    return reply.content.array_records[messages.ARRAYS]


def evaluate_round(
    grid: Grid,
    round_number: int,
    adapter: Adapter,
    cohort: Sequence[int],
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    timeout_seconds: float,
) -> tuple[float | None, Tally]:
    """Return the cohort's held-out loss in nats per answer token; None if nobody answered."""
    arrays = messages.to_arrays(adapter)
    outgoing = {
        partition: Message(
            messages.content(arrays=arrays, config={"round": round_number}),
            cards[partition].node_id,
            MessageType.EVALUATE,
            group_id=str(round_number),
        )
        for partition in cohort
    }
    tally = ask_cohort(
        grid,
        "evaluate",
        outgoing,
        ledger,
        timeout_seconds,
        lambda _, reply: messages.metrics_of(reply, messages.EVALUATE_METRICS),
        lambda *_: None,
    )
    tokens = sum(int(m["tokens"]) for m in tally.good.values())
    loss = sum(float(m["nll-sum"]) for m in tally.good.values()) / tokens if tokens else None
    return loss, tally


def examine_formulary(
    grid: Grid,
    adapter: Adapter,
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    timeout_seconds: float,
) -> tuple[dict[str, Any] | None, Tally]:
    """Let one site answer the formulary's questions with the adapter and without it.

    The server has no base model; the first site that answers well is enough. The tally has the
    failures of all that were asked before it.
    """
    tally, failed = Tally(), dict[int, str]()
    for partition, card in cards.items():
        message = Message(
            messages.content(arrays=messages.to_arrays(adapter)),
            card.node_id,
            f"{MessageType.EVALUATE}.formulary",
            group_id="formulary",
        )
        tally = ask_cohort(
            grid,
            "formulary",
            {partition: message},
            ledger,
            timeout_seconds,
            lambda _, reply: messages.metrics_of(reply, messages.FORMULARY_METRICS),
            lambda *_: None,
        )
        failed |= tally.failed
        tally.failed = failed
        if tally.good:
            scores = tally.good[partition]
            return {
                kind: {
                    which: {
                        "correct": int(scores[f"{kind}-{which}-correct"]),
                        "n": int(scores[f"{kind}-{which}-n"]),
                    }
                    for which in ("base", "tuned")
                }
                for kind in ("public", "private")
            }, tally
    return None, tally
