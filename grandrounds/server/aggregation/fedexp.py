"""FedExP: the mean of the changes, extrapolated further the more they differ.

    w_next = w + eta D,   D = sum_i p_i d_i
    eta = max(1, min(sum_i p_i |d_i|^2 / (2 |D|^2), 1 / (2 sum_i p_i^2)))

Jhunjhunwala et al., FedExP: Speeding Up Federated Averaging via Extrapolation (ICLR 2023), with
weights p_i in place of the paper's 1 / M, and without its small constant added to |D|^2. With eta =
1, also where D is zero, it equals FedAvg to the bit. Changes of sites with different data are
nearly orthogonal, and their mean is shorter than each: for k such changes of equal length and
weight, the paper's eta is k / 2. Changes that oppose one another would make it larger without
limit (71 for two of them); the second term of the minimum, k / 2 for equal weights, bounds it. eta
is reported as `server-learning-rate`. Memory is that of `WeightedMean`, whatever the cohort.
"""

from __future__ import annotations

import math

import numpy as np

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.defence import norm
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import Adapter


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Extrapolation(config.name)


class Extrapolation(Average):
    """The weighted mean of the changes with FedExP's step."""

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round."""
        super().begin(round_number, adapter)
        self._weighted_squares: list[float] = []
        self._weight = 0
        self._squared_weights: float = 0  # exact as long as it is an integer

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's change to the sum, and its squared norm."""
        super().add(partition, received, change, weight)
        self._weighted_squares.append(weight * norm(change) ** 2)
        self._weight += weight
        self._squared_weights += weight**2

    def add_mean(self, mean: Adapter, square: float, squared_shares: float) -> None:
        """Add a round's mean of the changes, in the place of each of them.

        Parameters
        ----------
        square : float
            sum_i p_i |d_i|^2.
        squared_shares : float
            sum_i p_i^2.
        """
        super().add(0, {}, mean, 1)
        self._weighted_squares, self._weight = [square], 1
        self._squared_weights = squared_shares

    def result(self) -> Adapter:
        """Return the adapter plus eta times the mean of the changes."""
        mean = self.mean()
        # fsum is exact, whatever the order of arrival
        squares = math.fsum(self._weighted_squares) / self._weight
        length_squared = norm(mean) ** 2
        most = self._weight**2 / (2 * self._squared_weights)
        self._rate = max(1.0, min(squares / (2 * length_squared), most)) if length_squared else 1.0
        if self._rate == 1:
            return super().result()
        rate = np.float32(self._rate)
        return {**self._adapter, **{n: self._adapter[n] + rate * d for n, d in mean.items()}}

    def report(self) -> dict[str, float]:
        """Return eta."""
        return {"server-learning-rate": self._rate}
