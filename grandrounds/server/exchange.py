"""Messages to the sites and their replies; those that carry tensors are counted in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

from grandrounds.errors import BudgetError, EngineError, GrandRoundsError
from grandrounds.wire import messages
from grandrounds.wire.downlink import Parcel
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.names import SiteNames, one_line

LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.05, 1.0
"""Between two polls for replies; Flower's engines move messages every 0.1 s."""

Use = Callable[[int, Message], messages.Metrics]
"""Called with (partition id, reply); returns its metrics. Raises `GrandRoundsError` for an unusable
reply, which then counts as failed."""

OnReply = Callable[[int, str | None], None]
"""Called with (partition id, None or the failure), once for every selected site."""


def pause(waited_seconds: float) -> float:
    """Return the pause before the next poll: a twentieth of the time waited so far.

    A poll is one request per outstanding message, and real sites take minutes.
    """
    return min(max(LEAST_PAUSE_SECONDS, waited_seconds / 20), MOST_PAUSE_SECONDS)


@dataclass
class Tally:
    """The outcome of one exchange with a cohort."""

    good: dict[int, messages.Metrics] = field(default_factory=dict)
    """Partition id → metrics of its reply, if the reply was used."""
    failed: dict[int, str] = field(default_factory=dict)
    """Partition id → reason why its reply was not used."""
    spent: set[int] = field(default_factory=set)
    """Those of them whose privacy budget is spent."""
    silent: set[int] = field(default_factory=set)
    """Those of them that did not reply in time."""

    def reasons(self, names: SiteNames) -> str:
        """Return all failures, in one line."""
        return "; ".join(f"{names[p]}: {one_line(why)}" for p, why in sorted(self.failed.items()))


@dataclass
class Exchange:
    """The server's end of all messages of a run."""

    grid: Grid
    """Flower's connection to the nodes."""
    ledger: Ledger
    """The ledger that counts every message."""
    run: str
    """The run's key, under which sites keep their state."""
    timeout_seconds: float
    """Maximum wait for the replies of a cohort."""
    late: set[str] = field(default_factory=set)
    """Ids of messages without a reply at the end of their round."""

    def message(
        self,
        node: int,
        kind: str,
        round_number: int,
        parcel: Parcel,
        instruction: Mapping[str, float | int | str] | None = None,
    ) -> Message:
        """Return a message to a site with the adapter and its instructions.

        It outlives its round, so that late replies can be told from missing ones.
        """
        config: dict[str, bool | int | float | str] = {
            **{"round": round_number, messages.RUN: self.run},
            **parcel.config,
            **(instruction or {}),
        }
        return Message(
            messages.content(
                arrays=parcel.arrays,
                config=config,
                start=parcel.start,
            ),
            node,
            kind,
            ttl=max(DEFAULT_TTL, 2 * self.timeout_seconds),
            group_id=str(round_number),
        )

    def ask(
        self,
        kind: str,
        outgoing: Mapping[int, Message],
        use: Use,
        on_reply: OnReply = lambda *_: None,
    ) -> Tally:
        """Send messages to a cohort; count, check and use each reply as it arrives.

        Parameters
        ----------
        kind : str
            Kind of message in the ledger: `train`, `evaluate` or `formulary`.
        outgoing
            Partition id → message, addressed to the site's node.
        """
        partition_of = {m.metadata.dst_node_id: p for p, m in outgoing.items()}
        for message in outgoing.values():
            self.ledger.count(f"{kind}.down", messages.tensor_sizes(message))
        tally = Tally()
        by_node = {m.metadata.dst_node_id: m for m in outgoing.values()}
        # Only late client updates are counted.
        late = self.late if kind == "train" else set[str]()
        for node, reply in self.replies(by_node, self.timeout_seconds, late):
            partition = partition_of[node]
            self.ledger.count(f"{kind}.up", messages.tensor_sizes(reply))
            try:
                messages.raise_failure(reply)
                tally.good[partition] = use(partition, reply)
            except GrandRoundsError as error:
                tally.failed[partition] = one_line(str(error))
                if isinstance(error, BudgetError):
                    tally.spent.add(partition)
            on_reply(partition, tally.failed.get(partition))
        for partition in outgoing:
            if partition not in tally.good and partition not in tally.failed:
                tally.failed[partition] = f"no reply within {self.timeout_seconds:g} s"
                tally.silent.add(partition)
                on_reply(partition, tally.failed[partition])
        return tally

    def replies(
        self, outgoing: Mapping[int, Message], timeout_seconds: float, late: set[str]
    ) -> Iterator[tuple[int, Message]]:
        """Send one message per node and yield (node id, reply) as replies arrive.

        Replies are fetched one by one, so that waiting ones take no memory here. Ends when all have
        replied, or after `timeout_seconds`.

        Parameters
        ----------
        late
            Receives the ids of messages without a reply in time.
        """
        nodes = list(outgoing)
        message_ids = list(self.grid.push_messages(outgoing.values()))
        if len(message_ids) != len(nodes):
            raise EngineError(
                f"Flower accepted {len(message_ids)} of {len(nodes)} messages: do they exceed its "
                "message size limit? Send less (communication.downlink-codec), or raise the limit."
            )
        # Flower gives no id to a message whose node has gone; no reply will come.
        pending = {i: node for i, node in zip(message_ids, nodes, strict=True) if i}
        started = time.monotonic()
        while pending:
            waiting = len(pending)
            for message_id in list(pending):
                for reply in self.grid.pull_messages([message_id]):
                    yield pending.pop(message_id), reply
            if len(pending) == waiting:
                waited = time.monotonic() - started
                if waited > timeout_seconds:
                    late.update(pending)
                    return
                time.sleep(pause(waited))

    def count_late(self) -> int:
        """Count the late replies that have arrived by now; return how many report no error."""
        good = 0
        for message_id in sorted(self.late):
            for reply in self.grid.pull_messages([message_id]):
                self.late.discard(message_id)
                good += not reply.has_error()
                self.ledger.count("late.up", messages.tensor_sizes(reply))
        return good
