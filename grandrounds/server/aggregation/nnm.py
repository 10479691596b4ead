"""Nearest-neighbour mixing: each update becomes the mean of its neighbours, then their median.

    N_i = the k - f updates nearest to d_i, d_i among them,   y_i = mean of d_j over j in N_i
    w_next = w + geometric median of y_1 ... y_k

Allouah et al., Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity (AISTATS
2023), algorithm 2, before the geometric median, which is among the rules of its section 4. Where
honest updates differ more from one another than a hostile one from them, mixing brings the honest
together first. All updates weigh the same. Guaranteed for f < k / 2 hostile ones among k; if fewer
come than that, f is lowered. An update that few others have as a neighbour counts less, honest or
not: with nobody hostile, the result differs from the mean.
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
    squared_distances,
)
from grandrounds.server.aggregation.flower_rule import TOLERATED, require
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    hostile = config.num_malicious_nodes
    require(hostile >= 0, "num-malicious-nodes", hostile, "0 or above")
    return Mixing(config)


class Mixing(Combination):
    """The geometric median of mixed updates."""

    def coefficients(self, gram: Matrix, weights: NDArray[np.int64]) -> Coefficients:
        """Return the coefficients of the median of mixed updates, in terms of the updates."""
        hostile = self._config.for_replies(len(gram)).num_malicious_nodes
        self._report = {TOLERATED: hostile}
        mixing = neighbours(gram, hostile)
        equal = np.full(len(gram), 1 / len(gram))
        return geometric_median(mixing @ gram @ mixing.T, equal) @ mixing


def neighbours(gram: Matrix, hostile: int) -> Matrix:
    """Return the matrix whose row i averages the k - f updates nearest to update i.

    Of equally near ones the first are taken.
    """
    count = len(gram)
    distances = squared_distances(gram)
    np.fill_diagonal(distances, -1.0)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : count - hostile]
    mixing = np.zeros((count, count))
    np.put_along_axis(mixing, nearest, 1 / (count - hostile), axis=1)
    return mixing
