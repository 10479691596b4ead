"""The replies of one round, kept until all are there, for rules that need them side by side."""

from __future__ import annotations

from dataclasses import dataclass

from grandrounds.server.aggregation.weighted_mean import LARGEST_WEIGHT
from grandrounds.wire.adapter import Adapter


@dataclass(frozen=True)
class Reply:
    """One site's reply; the arrays are the caller's own, not copies."""

    received: Adapter
    """What the site started from."""
    change: Adapter
    """Its trained tensors minus those received."""
    weight: int
    """Its number of training examples."""


class Replies:
    """Replies by partition; read in the order of partitions, whoever came first.

    Memory grows with the cohort: one adapter a reply, and what a site received where that is not
    shared.
    """

    def __init__(self) -> None:
        self._replies: dict[int, Reply] = {}

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Keep one reply.

        Raises
        ------
        ValueError
            If the partition has replied before, its weight is out of range, or its names are not
            those of the replies before.
        """
        check_weight(weight)
        if partition in self._replies:
            raise ValueError(f"partition {partition} was added twice in one round")
        first = next(iter(self._replies.values()), None)
        if first is not None and first.change.keys() != change.keys():
            raise ValueError(f"partition {partition} changed other tensors than those before it")
        self._replies[partition] = Reply(received, change, weight)

    def ordered(self) -> list[Reply]:
        """Return the replies by partition; raise `ValueError` if there is none."""
        if not self._replies:
            raise ValueError("no reply was added")
        return [reply for _, reply in sorted(self._replies.items())]


def check_weight(weight: int) -> None:
    """Raise `ValueError` unless a weight is from 1 to `LARGEST_WEIGHT`."""
    if not 1 <= weight <= LARGEST_WEIGHT:
        raise ValueError(f"a weight must be from 1 to {LARGEST_WEIGHT}, not {weight}")


def check_shapes(change: Adapter, adapter: Adapter) -> None:
    """Raise `ValueError` where a tensor is not of the server's shape, so of another rank."""
    for name, tensor in change.items():
        if name not in adapter:
            raise ValueError(f"{name} is not in the server's adapter")
        if tensor.shape != adapter[name].shape:
            raise ValueError(
                f"{name} has the shape {tensor.shape}, the server's adapter {adapter[name].shape}: "
                "sites of another rank need the rule product or flora"
            )
