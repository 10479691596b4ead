"""The common part of rules whose result is a combination of the updates, chosen by their distances.

    w_next = w + sum_i c_i d_i

The coefficients c follow from the inner products <d_i, d_j> alone, so that no more than these is
computed of the updates, tensor by tensor in float64. The factors A and B are compared as one vector
each, as in the papers; see docs/aggregation.md for what that leaves open. Memory grows with the
cohort: the replies are kept until the round ends, and nothing else of their size but one tensor of
each in float64.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.defence import inner_products
from grandrounds.server.aggregation.replies import ComparableReplies
from grandrounds.wire.adapter import Adapter

Matrix = NDArray[np.float64]
Coefficients = NDArray[np.float64]

CLOSEST = 1e-6
"""Smallest distance by which an update's weight is divided, relative to the median length: nu of
the paper, where the divisor would vanish."""

ITERATIONS = 100
SETTLED = 1e-9
"""The iteration ends when no coefficient changes by more."""


class Combination(ComparableReplies):
    """A rule that combines the updates by coefficients."""

    def __init__(self, config: StrategyConfig) -> None:
        self._config = config

    @abstractmethod
    def coefficients(self, gram: Matrix, weights: NDArray[np.int64]) -> Coefficients:
        """Return the coefficient of each update.

        Parameters
        ----------
        gram : array of (updates, updates)
            Their inner products.
        weights : array of (updates,)
            Training examples of each site.
        """

    def result(self) -> Adapter:
        """Return the adapter plus the combination of the updates."""
        replies = self.enough_replies()
        changes = [reply.change for reply in replies]
        weights = np.array([reply.weight for reply in replies])
        chosen = self.coefficients(inner_products(changes), weights)
        self._kept = {}
        moved = {}
        for name in changes[0]:
            total = self._adapter[name].astype(np.float64)
            for c, change in zip(chosen, changes, strict=True):
                total += c * change[name].astype(np.float64)
            moved[name] = total.astype(np.float32)
        return {name: moved.get(name, tensor) for name, tensor in self._adapter.items()}


def squared_distances(gram: Matrix) -> Matrix:
    """Return |d_i - d_j|^2 from the inner products."""
    own = np.diag(gram)
    squared: Matrix = np.maximum(own[:, None] + own[None, :] - 2 * gram, 0.0)
    return squared


def geometric_median(gram: Matrix, shares: Coefficients) -> Coefficients:
    """Return the coefficients of the geometric median of some updates.

    The v that minimises sum_i a_i |v - d_i|, by the smoothed Weiszfeld algorithm: from the mean,

        v <- sum_i b_i d_i / sum_i b_i,   b_i = a_i / max(nu, |v - d_i|)

    (Pillutla et al., 2022, algorithm 2). Every v is a combination of the d_i, so the distances
    follow from their inner products.

    Parameters
    ----------
    gram : array of (updates, updates)
    shares : array of (updates,)
        The weights a, which sum to 1.
    """
    own = np.diag(gram)
    chosen, squares = shares, own[own > 0].tolist()
    if not squares:  # no update changes anything
        return chosen
    smallest = CLOSEST * math.sqrt(statistics.median_low(squares))
    for _ in range(ITERATIONS):
        squared = own - 2 * gram @ chosen + chosen @ gram @ chosen
        weighted = shares / np.maximum(np.sqrt(np.maximum(squared, 0.0)), smallest)
        before, chosen = chosen, weighted / weighted.sum()
        if np.abs(chosen - before).max() < SETTLED:
            break
    return chosen
