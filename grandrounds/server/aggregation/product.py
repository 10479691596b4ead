"""The mean of the sites' models itself, cut back to the adapter's rank: exact up to that cut.

    P = sum_i p_i B_i A_i,   (B_next, A_next) = best factors of rank r of P

Redistribution by SVD is FlexLoRA's (Bai et al., Federated Fine-tuning of Large Language Models
under Heterogeneous Tasks and Client Resources, 2024); here no (out, in) matrix is ever formed (see
`low_rank`). Sites may be of lower rank, or have received the adapter through a lossy codec. With
hats on what a site received, so that what never reached it is not lost,

    P = B A + sum_i p_i (B_i A_i - ^B_i ^A_i)

which is sum_i p_i B_i A_i where every site received B and A themselves: those terms cancel by
their whole-number weights, exactly, and are left out.

What is cut, ||P - P_r||_F / ||P||_F over all modules, is reported as `truncation-error`. Memory
grows with the cohort: all replies are kept until the round ends; for the computation come, module
by module, a few float64 arrays of (out + in, ranks of all sites together).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.replies import Replies, Reply
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


class Product(Rule):
    """Best factors, of the server's rank, of the mean of the sites' models.

    Parameters
    ----------
    gauge : {"nearest", "balanced"}
        Which of the equal factors; `nearest` takes the mean of the sites' A as the anchor.
    """

    def __init__(self, gauge: Gauge = "nearest") -> None:
        self._gauge = gauge
        self._report: dict[str, float] = {}

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round."""
        self._adapter = adapter
        self._replies = Replies()

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Keep one reply."""
        self._replies.add(partition, received, change, weight)

    def result(self) -> Adapter:
        """Return the best factors of the mean of the models."""
        replies = self._replies.ordered()
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

    def report(self) -> dict[str, float]:
        """Return the truncation error."""
        return dict(self._report)


def distinct_starts(adapter: Adapter, replies: Sequence[Reply]) -> list[tuple[int, Adapter]]:
    """Return the different adapters that models start from, each with its weight in P.

    The server's comes first with the total weight minus that of the sites that received just it;
    the others with minus the weight of the sites that received them. Weight 0 is left out.
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
    """Whether two adapters are equal in every number."""
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
    """Return a tensor as the site has it after training, in float64."""
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
