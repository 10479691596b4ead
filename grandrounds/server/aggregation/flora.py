"""FLoRA: the sites' adapters are stacked instead of averaged, so that their mean is exact.

    A_next = [A; A_1; ...; A_k],   B_next = [B, p_1 B_1, ..., p_k B_k]
    B_next A_next = B A + sum_i p_i B_i A_i

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations (NeurIPS 2024), which folds the stack into the base after each round; here it stays an
adapter, whose rank R grows by the ranks of the round's sites. Each site trains a fresh adapter
(B = 0) beside the received one, which is frozen: `received` is that fresh adapter, `change` is
relative to it, and a site may have any rank.

If R would exceed `max_rank`, the product is truncated to that rank (QR and SVD, see `low_rank`).
The loss is reported as `truncation-error`, and R as `rank`. An adapter whose B is all zero, as
before round 1, is not stacked.

Scaling: an adapter adds alpha / r B A to the base. The sum above holds if that factor is the same
for the growing adapter and the fresh ones, so a checkpoint of rank R has alpha_R = R alpha / r.

Memory grows with the cohort: all replies are kept until the round ends.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.product import trained
from grandrounds.server.aggregation.replies import ReplyRule
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import A, Adapter, B
from grandrounds.wire.low_rank import (
    BestProduct,
    Term,
    best_product,
    factors,
    modules,
    relative_error,
)


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Flora(config.max_rank)


class Flora(ReplyRule):
    """The stack of all adapters so far, truncated to a maximum rank."""

    def __init__(self, max_rank: int) -> None:
        self._max_rank = max_rank

    def result(self) -> Adapter:
        """Return the stack, truncated where it would exceed the maximum rank."""
        out: dict[str, NDArray[np.float32]] = dict(self._adapter)
        cuts = list[BestProduct]()
        rank = 0
        for module, summed in self._stacks().items():
            a = np.concatenate([a for _, _, a in summed])  # (R, in)
            if len(a) > self._max_rank:
                best = best_product(summed, self._max_rank)
                out[module + A], out[module + B] = factors(best, self._max_rank, a, "balanced")
                cuts.append(best)
            else:
                b = np.concatenate([c * b.astype(np.float64) for c, b, _ in summed], axis=1)
                out[module + A], out[module + B] = a.astype(np.float32), b.astype(np.float32)
            rank = max(rank, len(out[module + A]))
        self._report = {"truncation-error": relative_error(cuts), "rank": float(rank)}
        return out

    def _stacks(self) -> dict[str, list[Term]]:
        """Return, for each module, the terms (c, B, A) to stack."""
        replies = self.replies()
        total = sum(reply.weight for reply in replies)
        names = modules(self._adapter)
        is_empty = not any(self._adapter[module + B].any() for module in names)
        stacks = {}
        for module in names:
            summed: list[Term] = [
                (reply.weight / total, trained(reply, module + B), trained(reply, module + A))
                for reply in replies
            ]
            if not is_empty:
                summed.insert(0, (1.0, self._adapter[module + B], self._adapter[module + A]))
            stacks[module] = summed
        return stacks
