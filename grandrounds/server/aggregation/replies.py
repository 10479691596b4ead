"""Rules that need all replies of a round at once."""

from __future__ import annotations

from dataclasses import dataclass

from grandrounds.config.keys import StrategyConfig
from grandrounds.errors import RoundError
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.aggregation.weighted_mean import check_weight
from grandrounds.wire.adapter import Adapter


@dataclass(frozen=True)
class Reply:
    """One site's reply; the arrays are not copied."""

    received: Adapter
    """The tensors from which the site started."""
    change: Adapter
    """Its trained tensors minus the received ones."""
    weight: int
    """Its number of training examples."""


class ReplyRule(Rule):
    """A rule that keeps a round's replies until all have arrived, whatever their order.

    Memory grows with the cohort: one adapter per reply, and the received adapters where sites do
    not share one.
    """

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round."""
        self._round, self._adapter = round_number, adapter
        self._kept: dict[int, Reply] = {}
        self._report: dict[str, float] = {}

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Keep one reply.

        Raises
        ------
        ValueError
            If the partition has replied before, its weight is out of range, or it changed other
            tensors than the replies before it.
        """
        check_weight(weight)
        if partition in self._kept:
            raise ValueError(f"partition {partition} was added twice in one round")
        first = next(iter(self._kept.values()), None)
        if first is not None and first.change.keys() != change.keys():
            raise ValueError(f"partition {partition} changed other tensors than those before it")
        self._kept[partition] = Reply(received, change, weight)

    def replies(self) -> list[Reply]:
        """Return the replies in the order of partitions; raise `ValueError` if there is none."""
        if not self._kept:
            raise ValueError("no client update was added")
        return [reply for _, reply in sorted(self._kept.items())]

    def report(self) -> dict[str, float]:
        """Return the figures of the last result."""
        return dict(self._report)


class ComparableReplies(ReplyRule):
    """A rule that compares replies, all of the server's rank, and needs a number of them."""

    _config: StrategyConfig

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Keep one reply."""
        check_shapes(change, self._adapter)
        super().add(partition, received, change, weight)

    def enough_replies(self) -> list[Reply]:
        """Return the replies in the order of partitions.

        Raises
        ------
        RoundError
            If they are fewer than the rule needs with its settings.
        """
        replies = self.replies()
        if len(replies) < (fewest := self._config.fewest_replies):
            raise RoundError(
                f"Round {self._round}: strategy.name = {self._config.name!r} needs at least "
                f"{fewest} good replies with its settings, but got {len(replies)}. Raise "
                "strategy.fraction-train or data.num-partitions."
            )
        return replies


def check_shapes(change: Adapter, adapter: Adapter) -> None:
    """Raise `ValueError` if a tensor's shape, and so its rank, differs from the server's."""
    for name, tensor in change.items():
        if name not in adapter:
            raise ValueError(f"{name} is not in the server's adapter")
        if tensor.shape != adapter[name].shape:
            raise ValueError(
                f"{name} has shape {tensor.shape}, but the server's adapter has "
                f"{adapter[name].shape}: sites of another rank need the rule product or flora"
            )
