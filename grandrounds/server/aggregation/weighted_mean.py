"""The weighted mean of adapter changes, summed as replies arrive: FedAvg and FedProx.

    w_next = w + sum_i (n_i / n) d_i,   n = sum_i n_i,   d_i = w_i - w

McMahan et al. (2017), algorithm 1; FedProx (Li et al., 2020, algorithm 2) differs only at the
sites. Averaging A and B apart is not the average of their products: mean(B) mean(A) is not
mean(B A). Of the changes themselves the mean is exact.
"""

from __future__ import annotations

import math

import numpy as np

from grandrounds.wire.adapter import Adapter, Shapes

LARGEST_WEIGHT = 2**29 - 1
"""Up to here a weight times a float32 number is exact in float64."""

CHUNK = 32768
"""Numbers added at a time, so that what is in between stays in the cache."""


class WeightedMean:
    """A running weighted sum whose result does not depend on the order of arrival.

    n_i d_i of a float32 change and a whole number below 2**29 is exact in float64. The sum is kept
    as two float64 numbers, high and low (Knuth's two-sum, TAOCP vol. 2, section 4.2.2, theorem B),
    with about 106 bits: what is rounded at the end to float32 is the same whoever came first.
    Memory is four adapters of float32, however many replies come.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._chunks = _chunks(self._shapes)
        count = sum(math.prod(shape) for shape in self._shapes.values())
        self._chunk = min(CHUNK, count)
        # two-sum needs the old high until its end: the new one is written a chunk further up, and
        # by the next reply, from the other end, a chunk further down
        self._store, self._start = np.zeros(count + self._chunk), 0
        self._low = np.zeros(count)
        self._term, self._partner = np.empty(self._chunk), np.empty(self._chunk)
        self.total_weight = 0
        """Sum of the weights so far, in examples."""
        self.count = 0
        """Replies added so far."""

    def add(self, change: Adapter, weight: int) -> None:
        """Add one site's change.

        Parameters
        ----------
        change : mapping of str to float32 array
            The site's adapter after its visit minus the adapter it received.
        weight : int
            Its number of training examples, at least 1.

        Raises
        ------
        ValueError
            If the weight is out of range or a tensor's shape is another one; nothing is added.
        """
        if not 1 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"a weight must be from 1 to {LARGEST_WEIGHT}, not {weight}")
        for name, shape in self._shapes.items():
            if change[name].shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, not {change[name].shape}")
        flat = {name: change[name].reshape(-1) for name in self._shapes}
        target = self._chunk - self._start
        for first, pieces in reversed(self._chunks) if target else self._chunks:
            length = 0
            for name, inside in pieces:
                part = flat[name][inside]
                self._term[length : length + len(part)] = part
                length += len(part)
            place = slice(first, first + length)
            high = self._store[self._start :][place]
            total = self._store[target:][place]
            term, partner = self._term[:length], self._partner[:length]
            term *= weight
            np.add(high, term, out=total)
            np.subtract(total, high, out=partner)
            # what rounding left out of `total`: (high - (total - partner)) + (term - partner)
            term -= partner
            np.subtract(total, partner, out=partner)
            np.subtract(high, partner, out=partner)
            term += partner
            self._low[place] += term
        self._start = target
        self.total_weight += weight
        self.count += 1

    def result(self, adapter: Adapter) -> Adapter:
        """Return the adapter plus the weighted mean of the changes.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        if not self.count:
            raise ValueError("no reply was added")
        out = {}
        high, start = self._store[self._start :], 0
        for name, shape in self._shapes.items():
            place = slice(start, start + math.prod(shape))
            mean = high[place] + self._low[place]
            mean /= self.total_weight
            mean += adapter[name].reshape(-1)
            out[name] = mean.astype(np.float32).reshape(shape)
            start = place.stop
        return out


def _chunks(shapes: Shapes) -> list[tuple[int, list[tuple[str, slice]]]]:
    """Return the tensors one after the other, cut: each chunk's first place and what is in it."""
    chunks: list[tuple[int, list[tuple[str, slice]]]] = []
    count = 0
    for name, shape in shapes.items():
        start, length = 0, math.prod(shape)
        while start < length:
            if count % CHUNK == 0:
                chunks.append((count, []))
            stop = min(length, start + CHUNK - count % CHUNK)
            chunks[-1][1].append((name, slice(start, stop)))
            count += stop - start
            start = stop
    return chunks
