"""The client updates of a round as they arrive: decoded, weighted, bounded, screened, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from grandrounds.config.keys import DefenceConfig, StrategyConfig
from grandrounds.errors import ReplyError
from grandrounds.server.aggregation import defence as bounds
from grandrounds.server.aggregation.weighted_mean import LARGEST_WEIGHT
from grandrounds.server.exchange import OnReply
from grandrounds.server.introductions import SiteCard
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, Shapes, count_parameters, rank_of, shapes_of
from grandrounds.wire.codecs.codec import Codec
from grandrounds.wire.downlink import Parcel, Sender
from grandrounds.wire.uplink import decode_change

SAMPLED = 16_384
"""Number of values of an update from which its cosine to the mean is estimated, to about 0.01, for
larger adapters."""

LARGEST_NORM = 1e15
"""No real update is longer; above, sums of squares leave the range of float32."""

Update = tuple[Adapter, int]
"""A change and its weight."""


@dataclass
class Updates:
    """The client updates of one round."""

    round_number: int
    parcels: Mapping[int, Parcel]
    """Partition → the parcel from which the site trains."""
    cards: Mapping[int, SiteCard]
    """The sites that may take part."""
    sender: Sender
    """Knows which tensors are sent up, and where each site started."""
    config: StrategyConfig
    """How updates are weighted."""
    defence: DefenceConfig
    """Bounds on single updates."""
    codec: Codec
    """Codec of the uplink."""
    _held: dict[int, Update] = field(default_factory=dict)
    _norms: dict[int, float] = field(default_factory=dict)
    _samples: dict[int, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    _bounded: int = 0

    def start_of(self, partition: int) -> Adapter:
        """Return the tensors that a site's change is relative to, at its training rank."""
        received, sender = self.parcels[partition].received, self.sender
        return sender.ranks.start_of(received, self._shapes, sender.seed, self.round_number)

    @property
    def _shapes(self) -> Shapes:
        return dict(shapes_of(self.sender.start))

    def admit(self, partition: int, reply: Message, metrics: messages.Metrics) -> Update | None:
        """Return a reply's change and weight; None if it must wait for the others (`min-cosine`).

        Raises
        ------
        ReplyError
            If the update cannot be used.
        """
        rank = rank_of(self.start_of(partition))
        expected = self.sender.ranks.shapes_up(self._shapes, self.round_number, rank)
        weight = claimed_examples(metrics, self.cards[partition])
        change = decode_change(_arrays_of(reply), self.codec, expected)
        change = self._measured(partition, change)
        update = change, 1 if self.config.weighting == "equal" else weight
        if self.defence.min_cosine <= -1:
            self._samples[partition] = sample(update[0]), update[1]
            return update
        self._held[partition] = update
        return None

    def waits(self, partition: int) -> bool:
        """Whether a site's update still waits for the screen."""
        return partition in self._held

    def _measured(self, partition: int, change: Adapter) -> Adapter:
        bound = self.defence.update_norm_bound or math.inf
        bounded, norm = bounds.norm_bound(change, bound)
        if norm > LARGEST_NORM:
            raise ReplyError(f"its update has a norm of {norm:.3g}, which no training can produce")
        self._norms[partition] = norm
        self._bounded += norm > bound
        return bounded

    def screened(self, failed: dict[int, str], on_reply: OnReply) -> Iterator[tuple[int, Update]]:
        """Yield the waiting updates that pass the screen; record the others in `failed`."""
        if not self._held:
            return
        changes = {p: change for p, (change, _) in self._held.items()}
        left_out = bounds.screen(changes, self.defence.min_cosine)
        for partition in sorted(self._held):
            update = self._held.pop(partition)
            if partition in left_out:
                failed[partition] = (
                    f"its update has a cosine of {left_out[partition]:.2f} to the mean of the "
                    f"others, below defence.min-cosine = {self.defence.min_cosine:g}"
                )
                on_reply(partition, failed[partition])
                continue
            self._samples[partition] = sample(update[0]), update[1]
            on_reply(partition, None)
            yield partition, update

    def report(self) -> dict[str, Any]:
        """Return each site's L2 norm and cosine to the weighted mean, for metrics.jsonl."""
        report: dict[str, Any] = {
            "update-norms": {str(p): norm for p, norm in sorted(self._norms.items())}
        }
        if self.defence.update_norm_bound:
            report["updates-bounded"] = self._bounded
        if len({len(values) for values, _ in self._samples.values()}) == 1:  # all of the same rank
            report["update-cosines"] = self._cosines()
        return report

    def _cosines(self) -> dict[str, float]:
        partitions = sorted(self._samples)
        rows = np.stack([self._samples[p][0] for p in partitions])
        mean = np.array([self._samples[p][1] for p in partitions], dtype=np.float64) @ rows
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(mean)
        dots = rows @ mean
        return {
            str(p): float(dot / length) if length > 0 else 0.0
            for p, dot, length in zip(partitions, dots, lengths, strict=True)
        }


def sample(change: Adapter) -> NDArray[np.float32]:
    """Return every k-th value of a change, about `SAMPLED` of them, the same for all sites."""
    step = count_parameters(shapes_of(change)) // SAMPLED | 1  # odd, so that no rank is skipped
    return np.concatenate([tensor.ravel()[::step] for tensor in change.values()])


def claimed_examples(metrics: messages.Metrics, card: SiteCard) -> int:
    """Return a reply's weight: its num-examples, capped by the site's introduction.

    Raises
    ------
    ReplyError
        If it is not an integer of at least 1, or too large to be exact.
    """
    claim = metrics.get("num-examples")
    if not isinstance(claim, int) or claim < 1:
        raise ReplyError(f"num-examples is {claim!r}, not an integer of at least 1")
    weight = min(claim, card.num_examples)
    if weight > LARGEST_WEIGHT:
        raise ReplyError(f"num-examples is {weight}, more than the {LARGEST_WEIGHT} allowed")
    return weight


def _arrays_of(reply: Message) -> ArrayRecord:
    if messages.ARRAYS not in reply.content.array_records:
        raise ReplyError("the reply has no tensors")
    return reply.content.array_records[messages.ARRAYS]
