"""LoRA-FAIR: the mean of A, and the mean of B corrected so that B A is near the mean of the models.

    A_next = sum_i p_i A_i,   B_mean = sum_i p_i B_i,   P = sum_i p_i B_i A_i
    B_next = B_mean + D,   D = argmin ||P - (B_mean + D) A_next||_F^2 + mu ||D||_F^2
           = B_mean + (P - B_mean A_next) A_next^T (A_next A_next^T + mu I)^-1

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement
(ICCV 2025). The paper maximises the cosine of P and (B_mean + D) A_next by gradient
descent, with a penalty lambda ||D||. Least squares has the same optimum without the penalty, up to
the length that a cosine leaves open, and is solved exactly: mu = `ridge` times the mean eigenvalue
of A_next A_next^T, so that the setting does not depend on the scale of A. The default is the
paper's lambda of 0.01.

P is that of `product`, also for sites that received the adapter through a lossy codec. No (out, in)
matrix is formed: P A_next^T is the sum of the p_i B_i (A_i A_next^T). What the correction leaves,
||P - B_next A_next||_F / ||P - B A||_F over all modules, is reported as `correction-error`. Memory
grows with the cohort: all replies are kept until the round ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.product import distinct_starts, terms
from grandrounds.server.aggregation.replies import Reply, ReplyRule, check_shapes
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import A, Adapter, B
from grandrounds.wire.low_rank import Matrix, Term, best_product, modules


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Corrected(config.ridge)


class Corrected(ReplyRule):
    """The mean of the factors, with B corrected for the mean A.

    Parameters
    ----------
    ridge : float
        mu relative to the mean eigenvalue of the mean A's Gram matrix; 0: least squares.
    """

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Keep one reply."""
        check_shapes(change, self._adapter)
        super().add(partition, received, change, weight)

    def result(self) -> Adapter:
        """Return the mean A, and the corrected mean B."""
        replies = self.replies()
        starts = distinct_starts(self._adapter, replies)
        out, left, update = dict(self._adapter), 0.0, 0.0
        for module in modules(self._adapter):
            before_a, before_b = self._adapter[module + A], self._adapter[module + B]
            a = mean(before_a, module + A, replies).astype(np.float32)  # (rank, in)
            summed = terms(module, starts, replies)
            b = corrected(summed, mean(before_b, module + B, replies), a, self._ridge)
            out[module + A], out[module + B] = a, b.astype(np.float32)
            left += square([*summed, (-1.0, out[module + B], a)])
            update += square([*summed, (-1.0, before_b, before_a)])
        self._report = {"correction-error": math.sqrt(left / update) if update else 0.0}
        self._kept = {}
        return out


def mean(start: NDArray[np.float32], name: str, replies: Sequence[Reply]) -> Matrix:
    """Return a tensor plus the weighted mean of its changes, in float64."""
    total = sum(reply.weight for reply in replies)
    summed = np.zeros(start.shape)
    for reply in replies:
        summed += reply.weight * reply.change[name].astype(np.float64)
    moved: Matrix = start + summed / total
    return moved


def corrected(summed: Sequence[Term], b: Matrix, a: NDArray[np.float32], ridge: float) -> Matrix:
    """Return B + D for the sum P of the terms.

    Parameters
    ----------
    summed : sequence of (c, B, A)
    b : array of (out, rank)
        The mean of the B.
    a : array of (rank, in)
        The mean of the A.
    ridge : float
        mu relative to the mean eigenvalue of A A^T.
    """
    right = a.T.astype(np.float64)  # (in, rank)
    gram = right.T @ right  # (rank, rank)
    residual = -b @ gram
    for share, b_i, a_i in summed:
        residual += share * b_i.astype(np.float64) @ (a_i.astype(np.float64) @ right)
    penalised = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    # A of linearly dependent rows has no unique solution without a ridge: the shortest
    moved: Matrix = b + np.linalg.lstsq(penalised, residual.T, rcond=None)[0].T
    return moved


def square(summed: Sequence[Term]) -> float:
    """Return the squared Frobenius norm of a sum of factor products."""
    return best_product(summed, 1).norm_squared
