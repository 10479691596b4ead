"""The round loop: who is asked, what comes back, what becomes of it.

Step 1  roll call: every site says what it holds; differences are named before anybody trains
Step 2  a cohort is drawn by seed and receives the adapter
Step 3  replies are checked, counted and added up as they arrive
Step 4  the new adapter is judged on held-out examples and written down
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import DEFAULT_TTL, Message, MessageType
from flwr.serverapp import Grid

from grandrounds.errors import GrandRoundsError, RoundError
from grandrounds.server.aggregation.product_error import ProductError, measured_modules
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.exchange import exchange
from grandrounds.server.roll_call import SiteCard
from grandrounds.server.updates import Terms, Updates
from grandrounds.wire import messages, protocol
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.codecs import Codec
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.downlink import Parcel, Sender
from grandrounds.wire.ledger import Ledger


@dataclass
class Tally:
    """What came of one exchange with a cohort."""

    good: dict[int, messages.Metrics] = field(default_factory=dict)
    """Partition id → metrics of a reply that was used."""
    failed: dict[int, str] = field(default_factory=dict)
    """Partition id → why its reply was not used."""


def ask_cohort(
    grid: Grid,
    kind: str,
    outgoing: Mapping[int, Message],
    ledger: Ledger,
    timeout_seconds: float,
    use: Callable[[int, Message], messages.Metrics],
    on_reply: Callable[[int, str | None], None],
    late: set[str] | None = None,
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
    late
        As for `exchange`.
    """
    partition_of = {m.metadata.dst_node_id: p for p, m in outgoing.items()}
    for message in outgoing.values():
        ledger.count(f"{kind}.down", messages.tensor_sizes(message))
    tally = Tally()
    by_node = {m.metadata.dst_node_id: m for m in outgoing.values()}
    for node, reply in exchange(grid, by_node, timeout_seconds, late):
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


NOT_THERE = "not connected"


def addressed(
    card: SiteCard,
    kind: str,
    round_number: int,
    run: str,
    parcel: Parcel,
    instruction: Mapping[str, float | int],
    timeout_seconds: float,
) -> Message:
    """Return a message to a site: the adapter, and what to do with it.

    It outlives its round, so that a reply that comes late is told from none.
    """
    config = {"round": round_number, messages.RUN: run, **parcel.config, **instruction}
    return Message(
        messages.content(arrays=parcel.arrays, config=config),
        card.node_id,
        kind,
        ttl=max(DEFAULT_TTL, 2 * timeout_seconds),
        group_id=str(round_number),
    )


def train_round(
    grid: Grid,
    round_number: int,
    adapter: Adapter,
    instructions: Mapping[int, Mapping[str, float | int]],
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    *,
    rule: Rule,
    sender: Sender,
    uplink_codec: Codec,
    terms: Terms,
    timeout_seconds: float,
    on_reply: Callable[[int, str | None], None],
    measure_product_error: bool = False,
    required_metrics: Collection[str] = ("num-examples",),
    late: set[str] | None = None,
) -> tuple[Adapter, Tally, dict[str, Any]]:
    """Train one cohort; return the new adapter, what came back, and what was measured of it.

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
    there = {p: instruction for p, instruction in instructions.items() if p in cards}
    parcels = {p: sender.parcel(round_number, p, adapter, trains=True) for p in there}
    outgoing = {
        partition: addressed(
            cards[partition],
            MessageType.TRAIN,
            round_number,
            sender.run,
            parcels[partition],
            instruction,
            timeout_seconds,
        )
        for partition, instruction in there.items()
    }
    shapes = protocol.shapes_of(adapter)
    modules = measured_modules(list(shapes), len(outgoing)) if measure_product_error else []
    product_error = ProductError(adapter, modules)
    updates = Updates(sender, round_number, parcels, cards, terms, uplink_codec)
    rule.begin(round_number, adapter)

    def add(partition: int, change: Adapter, weight: int) -> None:
        rule.add(partition, updates.start_of(partition), change, weight)
        product_error.add(change, weight)

    def use(partition: int, reply: Message) -> messages.Metrics:
        metrics = messages.metrics_of(reply, required_metrics)
        if (update := updates.admit(partition, reply, metrics)) is not None:
            add(partition, *update)
        return metrics

    def tell(partition: int, failure: str | None) -> None:
        if not updates.waits(partition):
            on_reply(partition, failure)

    tally = ask_cohort(grid, "train", outgoing, ledger, timeout_seconds, use, tell, late)
    for partition in instructions.keys() - there.keys():
        tally.failed[partition] = NOT_THERE
        on_reply(partition, NOT_THERE)
    for partition, update in updates.screened(tally.failed, on_reply):
        add(partition, *update)
    for partition in tally.failed:
        tally.good.pop(partition, None)
    settle(sender, parcels, tally)
    needed = math.ceil(terms.min_reply_fraction * len(instructions) - 1e-9)
    if len(tally.good) < needed:
        reasons = "; ".join(f"site {p}: {why}" for p, why in sorted(tally.failed.items()))
        raise RoundError(
            f"Round {round_number}: {len(tally.good)} of {len(instructions)} sites replied well, "
            f"at least {needed} are needed (strategy.min-reply-fraction = "
            f"{terms.min_reply_fraction:g}). {reasons}"
        )
    new = rule.result()
    if not all(map(all_finite, (*new.values(), *rule.state().values()))):
        raise RoundError(
            f"Round {round_number}: {sender.rule} made numbers that are not finite of updates that "
            "are. Lower the learning rates, or set defence.update-norm-bound; the round is dropped."
        )
    measured: dict[str, Any] = {**rule.report(), **updates.report()}
    if modules:
        measured["product-error"] = product_error.result()
        measured["product-error-of-update"] = product_error.of_update()
    return new, tally, measured


def settle(sender: Sender, parcels: Mapping[int, Parcel], tally: Tally) -> None:
    """Let the sender know which sites have what they were sent."""
    for partition, parcel in parcels.items():
        if partition in tally.good:
            sender.confirm(partition, parcel)
        else:
            sender.forget(partition)


def evaluate_round(
    grid: Grid,
    round_number: int,
    adapter: Adapter,
    cohort: Sequence[int],
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    sender: Sender,
    timeout_seconds: float,
) -> tuple[float | None, Tally]:
    """Return the cohort's held-out loss in nats per answer token; None if nobody answered.

    The loss is that of the adapter as the sites receive it.
    """
    there = [p for p in cohort if p in cards]
    parcels = {p: sender.parcel(round_number, p, adapter, trains=False) for p in there}
    outgoing = {
        partition: addressed(
            cards[partition],
            MessageType.EVALUATE,
            round_number,
            sender.run,
            parcel,
            {},
            timeout_seconds,
        )
        for partition, parcel in parcels.items()
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
    settle(sender, parcels, tally)
    tally.failed |= dict.fromkeys(set(cohort) - set(there), NOT_THERE)
    tokens = sum(int(m["tokens"]) for m in tally.good.values())
    loss = sum(float(m["nll-sum"]) for m in tally.good.values()) / tokens if tokens else None
    return loss, tally


def examine_formulary(
    grid: Grid,
    adapter: Adapter,
    cards: Mapping[int, SiteCard],
    ledger: Ledger,
    sender: Sender,
    timeout_seconds: float,
) -> tuple[dict[str, Any] | None, Tally]:
    """Let one site answer the formulary's questions with the adapter and without it.

    The server has no base model; the first site that answers well is enough. The adapter travels
    as float32: what is judged is what the checkpoint holds. The tally has the failures of all that
    were asked before it.
    """
    parcel = sender.exact(adapter)
    tally, failed = Tally(), dict[int, str]()
    for partition, card in cards.items():
        kind = f"{MessageType.EVALUATE}.formulary"
        message = addressed(card, kind, 0, sender.run, parcel, {}, timeout_seconds)
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
