"""One attempt at a masked sum, from the server: one message to each site in each exchange."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, MessageType

from grandrounds.errors import ReplyError, RoundError
from grandrounds.server.exchange import Exchange, OnReply, Tally
from grandrounds.server.masks.masked_sum import MaskedSum
from grandrounds.server.masks.ride import Ride
from grandrounds.wire import messages
from grandrounds.wire.downlink import Parcel
from grandrounds.wire.masks.attempt import (
    CONFIRM,
    KEYS,
    MASKED,
    MASKS,
    RIDES,
    SHARES,
    UNMASK,
)
from grandrounds.wire.masks.carried import ATTEMPT, NEXT, carried, received_digest, sent
from grandrounds.wire.masks.fixed_point import FixedPoint, Sum

MASKED_KIND = f"{MessageType.TRAIN}.{MASKED}"

NOT_ABOARD = "was not there when this round's keys were exchanged, on the round before"

Take = Callable[[int, bytes], None]


@dataclass
class Play:
    """An attempt, exchange by exchange; each raises `RoundError` if too few sites are left."""

    exchange: Exchange
    collected: MaskedSum
    outgoing: dict[int, Message]
    """Partition id → message with adapter and instruction."""
    least: int
    """Fewest sites whose sum the run can use."""
    ride: Ride
    failed: dict[int, str] = field(default_factory=dict)
    """Partition id → why the site does not answer any more."""
    spent: set[int] = field(default_factory=set)
    """Those of them whose privacy budget is spent."""
    silent: set[int] = field(default_factory=set)
    """Those of them that did not reply in time."""
    waits: int = 0
    """Exchanges so far: messages to several sites, and a wait for their replies."""

    def keep_to(self, sites: Collection[int]) -> None:
        """Ask these sites only."""
        self.outgoing = {site: self.outgoing[site] for site in sites if site in self.outgoing}

    def agree(self) -> None:
        """Let the sites exchange keys and shares, unless they have done so before."""
        left = self.outgoing.keys()
        self._ask(KEYS, left, b"", self.collected.take_keys)
        request = self.collected.key_list(self.least)
        self._ask(SHARES, left - self.failed.keys(), request, self.collected.take_shares)

    def board(self) -> None:
        """Begin with the keys and shares that rode on the round before."""
        gone = set(self.collected.linked()) - self.outgoing.keys()
        self.collected.leave_out(gone)
        aboard = self.collected.linked(self.least)
        self.failed |= dict.fromkeys(self.outgoing.keys() - set(aboard), NOT_ABOARD)

    def train(self, numbers: FixedPoint, on_reply: OnReply) -> Tally:
        """Let the sites train; add up their masked vectors."""
        linked = self.collected.linked(self.least)
        first = next(iter(self.outgoing.values()))
        self.collected.expect(numbers, received_digest(first.content))
        for site in linked:
            self.outgoing[site].content[MASKS] = sent(MASKED, self.collected.boxes(site))
        for site, why in self.failed.items():
            on_reply(site, why)
        most_bytes = self.collected.numbers.size_bytes

        def use(site: int, reply: Message) -> messages.Metrics:
            metrics = messages.metrics_of(reply)
            vector = carried(reply.content, MASKED, most_bytes)
            self.collected.take_masked(site, np.frombuffer(vector, dtype=np.uint8))
            return metrics

        outgoing = {site: self.outgoing[site] for site in linked}
        tally = self.exchange.ask(MessageType.TRAIN, outgoing, use, on_reply)
        self.waits += 1
        self.spent |= tally.spent
        self.silent |= tally.silent
        tally.failed |= self.failed
        self.failed |= tally.failed
        return tally

    def confirm(self) -> None:
        """Let the survivors sign who they are."""
        survivors = self.collected.survivors(self.least)
        left = self.outgoing.keys() - self.failed.keys()
        self._ask(CONFIRM, left, survivors, self.collected.take_signature)
        self.collected.signatures()

    def unmask(self) -> Sum:
        """Let the survivors reveal what removes the masks; return the sum.

        Raises
        ------
        RoundError
            If too few did, or what is left is no sum.
        """
        left = self.outgoing.keys() - self.failed.keys()
        self._ask(UNMASK, left, self.collected.signatures(), self.collected.take_opened)
        try:
            return self.collected.numbers.decode(self.collected.total())
        except ReplyError as error:
            raise RoundError(f"Round {self.collected.attempt.round}: {error}") from error

    def _ask(self, kind: str, sites: Collection[int], request: bytes, take: Take) -> None:
        """Play an exchange that carries no adapter, and let the next round's ride on it."""
        rides = RIDES.get(kind, "")
        riders = self.ride.requests(rides, self.silent) if rides else {}
        this, following = self.collected.attempt, self.ride.following.attempt
        outgoing = {}
        for site in sites:
            said = {ATTEMPT: this.number, **({NEXT: following.number} if site in riders else {})}
            node = self.outgoing[site].metadata.dst_node_id
            outgoing[site] = self._message(node, kind, this.round, request, said)
            if riders.get(site):
                outgoing[site].content[NEXT] = sent(rides, riders[site])
        for site in sorted(riders.keys() - outgoing.keys()):
            said = {ATTEMPT: following.number}
            outgoing[site] = self._message(
                self.ride.nodes[site], rides, following.round, riders[site], said
            )

        def use(site: int, reply: Message) -> messages.Metrics:
            if site in sites:
                take(site, carried(reply.content, kind))
            if site in riders:
                self.ride.take(site, rides, reply.content, rides=site in sites)
            return {}

        tally = self.exchange.ask(MASKS, outgoing, use)
        self.waits += 1
        self.failed |= {site: why for site, why in tally.failed.items() if site in sites}
        self.silent |= tally.silent.intersection(sites)
        self.ride.failed |= {site: why for site, why in tally.failed.items() if site in riders}

    def _message(
        self, node: int, kind: str, number: int, request: bytes, said: Mapping[str, int]
    ) -> Message:
        parcel = Parcel(sent(kind, request) if request else None, {}, {})
        return self.exchange.message(node, f"{MessageType.TRAIN}.{kind}", number, parcel, said)
