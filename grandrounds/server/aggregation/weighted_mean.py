"""The weighted mean of adapter changes, summed as replies arrive: FedAvg and FedProx.

    w_next = w + sum_i (n_i / n) d_i,   n = sum_i n_i,   d_i = w_i - w

McMahan et al. (2017), algorithm 1; FedProx (Li et al., 2020, algorithm 2) differs only at the
sites. Averaging the LoRA factors separately is not averaging their products: mean(B) mean(A) is
not mean(B A). The mean of the changes themselves is exact.
"""

from __future__ import annotations

import math

import numpy as np

from grandrounds.wire.adapter import Adapter, Shapes

LARGEST_WEIGHT = 2**29 - 1
"""Up to here, a weight times a float32 value is exact in float64."""

CHUNK = 32768
"""Values added at a time, so that intermediates stay in the cache."""


class WeightedMean:
    """A running weighted sum whose result does not depend on the order of arrival.

    The product n_i d_i of a float32 change and an integer below 2**29 is exact in float64. The sum
    is kept as two float64 values, high and low (Knuth's two-sum, TAOCP vol. 2, section 4.2.2,
    theorem B), with about 106 bits, so the float32 result does not depend on the order of arrival.
    Memory is four float32 adapters, whatever the number of replies.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._chunks = _chunks(self._shapes)
        count = sum(math.prod(shape) for shape in self._shapes.values())
        self._chunk = min(CHUNK, count)
        # two-sum reads the old high until it ends, so the new one is written one chunk higher, and
        # for the next reply, from the other end, one chunk lower
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
            The site's adapter after its visit minus the received one.
        weight : int
            Its number of training examples, at least 1.

        Raises
        ------
        ValueError
            If the weight is out of range or a tensor has the wrong shape; nothing is added.
        """
        check_weight(weight)
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
            # rounding error of `total`: (high - (total - partner)) + (term - partner)
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


def check_weight(weight: int) -> None:
    """Raise `ValueError` unless a weight is from 1 to `LARGEST_WEIGHT`."""
    if not 1 <= weight <= LARGEST_WEIGHT:
        raise ValueError(f"a weight must be from 1 to {LARGEST_WEIGHT}, not {weight}")


def _chunks(shapes: Shapes) -> list[tuple[int, list[tuple[str, slice]]]]:
    """Cut the concatenated tensors into chunks: each chunk's offset, and its pieces of tensors."""
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
