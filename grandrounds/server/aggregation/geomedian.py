"""RFA: the geometric median of the updates, by the smoothed Weiszfeld algorithm.

    w_next = w + the v that minimises sum_i p_i |v - d_i|

Pillutla et al., Robust Aggregation for Federated Learning (IEEE Transactions on Signal Processing
2022), equation 5 and algorithm 2 (see `combination.geometric_median`). An update pulls with the
force p_i whatever its length, so hostile ones with less than half of the total weight cannot move
the result beyond a bound that depends on the honest ones. They do pull: updates that agree with one
another shift the result within that bound. Weights are numbers of examples, as for `fedavg`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.combination import (
    Coefficients,
    Combination,
    Matrix,
    geometric_median,
)
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return GeometricMedian(config)


class GeometricMedian(Combination):
    """The geometric median of the updates."""

    def coefficients(self, gram: Matrix, weights: NDArray[np.int64]) -> Coefficients:
        """Return the coefficients of the geometric median."""
        return geometric_median(gram, weights / weights.sum())
