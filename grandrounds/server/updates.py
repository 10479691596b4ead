"""The client updates of a round as they arrive: decoded, weighted, bounded, screened, measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from grandrounds.config.keys import DefenceConfig, StrategyConfig
from grandrounds.config.words import beyond
from grandrounds.errors import ReplyError
from grandrounds.server.aggregation import defence as bounds
from grandrounds.server.exchange import OnReply
from grandrounds.server.set_aside import SetAside
from grandrounds.server.weights import claimed_examples
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, Shapes, count_parameters, shapes_of
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
    limits: Mapping[int, int]
    """Partition → the most that the site may weigh, in examples."""
    sender: Sender
    """Knows which tensors are sent up, and where each site started."""
    config: StrategyConfig
    """How updates are weighted."""
    defence: DefenceConfig
    """Bounds on single updates."""
    codec: Codec
    """Codec of the uplink."""
    earlier_norms: Sequence[float] = ()
    """L2 norms of the updates used in the last rounds."""
    _held: dict[int, Adapter | None] = field(default_factory=dict)
    """Partition → the change that waits; None: it waits on disk."""
    _weights: dict[int, int] = field(default_factory=dict)
    _norms: dict[int, float] = field(default_factory=dict)
    _samples: dict[int, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    _rejected: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def start_of(self, partition: int) -> Adapter:
        """Return the tensors that a site's change is relative to, at its training rank."""
        received, sender = self.parcels[partition].received, self.sender
        return sender.ranks.start_of(received, self._shapes, sender.seed, self.round_number)

    @property
    def _shapes(self) -> Shapes:
        return dict(shapes_of(self.sender.start))

    def admit(self, partition: int, reply: Message, metrics: messages.Metrics) -> Update | None:
        """Return a reply's change and weight; None if it must wait for the others.

        It waits for the median of the round's norms if there were none before (`largest-norm`), and
        for the screens (`min-cosine`, `largest-spread`).

        Raises
        ------
        ReplyError
            If the update cannot be used.
        """
        ranks = self.sender.ranks
        rank = ranks.of_adapter(self.start_of(partition))
        expected = ranks.shapes_up(self._shapes, self.round_number, rank)
        weight = claimed_examples(metrics, self.limits[partition])
        change = decode_change(_arrays_of(reply), self.codec, expected)
        change = self._measured(partition, change)
        weight = 1 if self.config.weighting == "equal" else weight
        self._weights[partition] = weight
        if self._bound is not None and not self._screens:
            self._samples[partition] = sample(change), weight
            return change, weight
        if self._screens:  # it compares all changes with one another
            self._held[partition] = change
        else:
            self._held[partition] = None
            self._aside.put(partition, change)
        return None

    @cached_property
    def _aside(self) -> SetAside:
        return SetAside()

    def waits(self, partition: int) -> bool:
        """Whether a site's update still waits for the screen, which may reject it."""
        return self._screens and partition in self._held

    @property
    def _screens(self) -> bool:
        return self.defence.screens

    @cached_property
    def _bound(self) -> float | None:
        """The largest norm of an update in this round; None before the norms are known."""
        most = self.defence.update_norm_bound or math.inf
        if not self.defence.largest_norm:
            return most
        if not self.earlier_norms:
            return None
        return min(most, self.defence.largest_norm * statistics.median_low(self.earlier_norms))

    def _measured(self, partition: int, change: Adapter) -> Adapter:
        """Return a change, scaled down to the bound if that is known; note its norm."""
        bound = math.inf if self._bound is None else self._bound
        bounded, norm = bounds.norm_bound(change, bound)
        if norm > LARGEST_NORM:
            raise ReplyError(f"its update has a norm of {norm:.3g}, which no training can produce")
        self._norms[partition] = norm
        return bounded

    def _take_bound(self) -> float:
        """Return the bound of the waiting updates, which may follow from their own norms."""
        norms = [self._norms[p] for p in self._held if self._norms[p] > 0]
        if self._bound is None and norms:
            self.earlier_norms = norms
            del self._bound  # is computed anew
        return math.inf if self._bound is None else self._bound

    def screened(self, failed: dict[int, str], on_reply: OnReply) -> Iterator[tuple[int, Update]]:
        """Yield the waiting updates that pass the screen; record the others in `failed`."""
        if not self._held:
            return
        bound = self._take_bound()
        left_out: dict[int, str] = {}
        if self._screens:
            held = {p: bounds.norm_bound(c, bound)[0] for p, c in self._held.items() if c}
            self._held.update(held)
            left_out = self._left_out(held)
        for partition in sorted(self._held):
            change = self._held.pop(partition)
            if partition in left_out:
                if change is not None:
                    self._rejected[partition] = sample(change)
                failed[partition] = left_out[partition]
                on_reply(partition, failed[partition])
                continue
            if change is None:
                change = bounds.norm_bound(self._aside.take(partition), bound)[0]
            weight = self._weights[partition]
            self._samples[partition] = sample(change), weight
            if self._screens:
                on_reply(partition, None)
            yield partition, (change, weight)

    def _left_out(self, held: Mapping[int, Adapter]) -> dict[int, str]:
        """Return the sites that the screens reject, and why: of spread first, then of direction."""
        how, reasons = self.defence, dict[int, str]()
        if how.largest_spread:
            for p, spread in bounds.outlying(held, how.largest_spread).items():
                reasons[p] = (
                    "its update lies farthest in a direction in which they spread "
                    f"{beyond(spread, how.largest_spread)} times as much as usual, above "
                    f"defence.largest-spread = {how.largest_spread:g}"
                )
        rest = {p: change for p, change in held.items() if p not in reasons}
        for p, cosine in bounds.screen(rest, how.min_cosine).items():
            reasons[p] = (
                f"its update has a cosine of {beyond(cosine, how.min_cosine, 2)} to the mean of "
                f"the others, below defence.min-cosine = {how.min_cosine:g}"
            )
        return reasons

    def report(self) -> dict[str, Any]:
        """Return each site's weight, L2 norm and cosine to the weighted mean, for metrics.jsonl."""
        report: dict[str, Any] = {
            "weights": {str(p): self._weights[p] for p in sorted(self._samples)},
            "update-norms": {str(p): norm for p, norm in sorted(self._norms.items())},
        }
        if self._bound is not None and self._bound < math.inf:
            report["norm-bound"] = self._bound
            report["updates-bounded"] = sum(norm > self._bound for norm in self._norms.values())
        of_all = (*(values for values, _ in self._samples.values()), *self._rejected.values())
        if self._samples and len(set(map(len, of_all))) == 1:  # all of the same rank
            report["update-cosines"] = self._cosines()
        return report

    def _cosines(self) -> dict[str, float]:
        """Return the cosine of each update, used or rejected, to the mean of the used ones."""
        used = sorted(self._samples)
        rows = np.stack([self._samples[p][0] for p in used])
        mean = np.array([self._samples[p][1] for p in used], dtype=np.float64) @ rows
        found = _cosines_to(mean, rows)
        if self._rejected:
            used += sorted(self._rejected)
            found += _cosines_to(mean, np.stack([self._rejected[p] for p in used[len(found) :]]))
        return {str(p): cosine for p, cosine in sorted(zip(used, found, strict=True))}


def _cosines_to(mean: NDArray[np.float64], rows: NDArray[np.float32]) -> list[float]:
    """Return the cosine of each row to the mean; 0 where one of them is 0."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(mean)
    dots = rows @ mean
    return [float(d / n) if n > 0 else 0.0 for d, n in zip(dots, lengths, strict=True)]


def sample(change: Adapter) -> NDArray[np.float32]:
    """Return every k-th value of a change, about `SAMPLED` of them, the same for all sites."""
    step = count_parameters(shapes_of(change)) // SAMPLED | 1  # odd, so that no rank is skipped
    return np.concatenate([tensor.ravel()[::step] for tensor in change.values()])


def _arrays_of(reply: Message) -> ArrayRecord:
    if messages.ARRAYS not in reply.content.array_records:
        raise ReplyError("the reply has no tensors")
    return reply.content.array_records[messages.ARRAYS]
