"""The weighted mean of adapter changes, summed as replies arrive: FedAvg and FedProx.

    w_next = w + sum_i (n_i / n) d_i,   n = sum_i n_i,   d_i = w_i - w

McMahan et al. (2017), algorithm 1; FedProx (Li et al., 2020, algorithm 2) differs only at the
sites. Averaging A and B apart is not the average of their products: mean(B) mean(A) is not
mean(B A). Of the changes themselves the mean is exact.
"""

from __future__ import annotations

import numpy as np

from grandrounds.adapter import Adapter, Shapes

LARGEST_WEIGHT = 2**29 - 1
"""Up to here a weight times a float32 number is exact in float64."""


class WeightedMean:
    """A running weighted sum whose result does not depend on the order of arrival.

    n_i d_i of a float32 change and a whole number below 2**29 is exact in float64. The sum is kept
    as two float64 numbers, high and low (Knuth's two-sum, TAOCP vol. 2, section 4.2.2, theorem B),
    with about 106 bits: what is rounded at the end to float32 is the same whoever came first.
    Memory is four adapters of float32, however many replies come.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._high = {name: np.zeros(shape) for name, shape in shapes.items()}
        self._low = {name: np.zeros(shape) for name, shape in shapes.items()}
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
        """
        if not 1 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"a weight must be from 1 to {LARGEST_WEIGHT}, not {weight}")
        for name, high in self._high.items():
            term = change[name].astype(np.float64)
            term *= weight
            total = high + term
            partner = total - high
            # what rounding left out of `total`: (high - (total - partner)) + (term - partner)
            term -= partner
            np.subtract(total, partner, out=partner)
            np.subtract(high, partner, out=partner)
            term += partner
            self._low[name] += term
            self._high[name] = total
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
        for name, high in self._high.items():
            mean = (high + self._low[name]) / self.total_weight
            out[name] = (adapter[name] + mean).astype(np.float32)
        return out
