"""The mean of the sites' models, truncated to the adapter's rank: exact up to the truncation.

    P = sum_i p_i B_i A_i,   (B_next, A_next) = best factors of rank r of P

Redistribution by SVD is FlexLoRA's (Bai et al., Federated Fine-tuning of Large Language Models
under Heterogeneous Tasks and Client Resources, 2024); here no (out, in) matrix is ever formed (see
`low_rank`). Sites may have a lower rank, or may have received the adapter through a lossy codec.
With hats for what a site received, the full mean is

    P = B A + sum_i p_i (B_i A_i - ^B_i ^A_i)

which is sum_i p_i B_i A_i if every site received B and A exactly: these terms then cancel exactly
in their integer weights, and are left out.

The truncation, ||P - P_r||_F / ||P||_F over all modules, is reported as `truncation-error`. Memory
grows with the cohort: all replies are kept until the round ends. The computation needs, module by
module, a few float64 arrays of (out + in, sum of all sites' ranks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.replies import Reply, ReplyRule
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import A, Adapter, B
from grandrounds.wire.low_rank import (
    BestProduct,
    Gauge,
    Term,
    best_product,
    factors,
    modules,
    relative_error,
)


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Product()


class Product(ReplyRule):
    """The best factors, at the server's rank, of the mean of the sites' models.

    Parameters
    ----------
    gauge : {"nearest", "balanced"}
        Which of the equivalent factors; `nearest` uses the mean of the sites' A as the anchor.
    """

    def __init__(self, gauge: Gauge = "nearest") -> None:
        self._gauge = gauge

    def result(self) -> Adapter:
        """Return the best factors of the mean of the models."""
        replies = self.replies()
        starts = distinct_starts(self._adapter, replies)
        out, cuts = dict(self._adapter), list[BestProduct]()
        for module in modules(self._adapter):
            a = self._adapter[module + A]
            best = best_product(terms(module, starts, replies), len(a))
            out[module + A], out[module + B] = factors(
                best, len(a), mean_a(module, a, replies), self._gauge
            )
            cuts.append(best)
        self._report = {"truncation-error": relative_error(cuts)}
        return out


def distinct_starts(adapter: Adapter, replies: Sequence[Reply]) -> list[tuple[int, Adapter]]:
    """Return the distinct adapters that the sites started from, each with its weight in P.

    The server's adapter comes first, with the total weight minus that of the sites that received
    it exactly; each other has minus the weight of its sites. Those of weight 0 are left out.
    """
    starts = [(sum(reply.weight for reply in replies), adapter)]
    for reply in replies:
        for place, (weight, start) in enumerate(starts):
            if is_same(reply.received, start):
                starts[place] = (weight - reply.weight, start)
                break
        else:
            starts.append((-reply.weight, reply.received))
    return [(weight, start) for weight, start in starts if weight]


def is_same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal in every value."""
    return one is other or all(np.array_equal(one[name], other[name]) for name in other)


def terms(
    module: str, starts: Sequence[tuple[int, Adapter]], replies: Sequence[Reply]
) -> list[Term]:
    """Return the terms (c, B, A) whose sum is P of one module."""
    total = sum(reply.weight for reply in replies)
    summed: list[Term] = [
        (weight / total, start[module + B], start[module + A]) for weight, start in starts
    ]
    for reply in replies:
        b, a = trained(reply, module + B), trained(reply, module + A)
        summed.append((reply.weight / total, b, a))
    return summed


def trained(reply: Reply, name: str) -> NDArray[np.float64]:
    """Return a tensor of the site after training, in float64."""
    return reply.received[name].astype(np.float64) + reply.change[name]


def mean_a(
    module: str, start: NDArray[np.float32], replies: Sequence[Reply]
) -> NDArray[np.float64]:
    """Return A plus the mean change of A; sites of another rank count as unchanged."""
    mean = start.astype(np.float64)
    total = sum(reply.weight for reply in replies)
    for reply in replies:
        change = reply.change[module + A]
        if change.shape == start.shape:
            mean += reply.weight / total * change.astype(np.float64)
    return mean
