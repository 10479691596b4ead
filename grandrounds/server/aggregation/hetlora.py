"""HetLoRA: sites of mixed ranks, averaged with zeros in the ranks they lack, by their norms.

    A_next = sum_i c_i pad(A_i),   B_next = sum_i c_i pad(B_i),   c_i = S_i / sum_j S_j
    S_i = ||B_i A_i||_F over all modules

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (EMNLP
2024). A site of rank r receives the first r ranks of the adapter. The number of its
examples does not count: its norm does, so that sites whose update is sparse weigh less. A rank that
no site of the round has would become zero in both factors, and never move again: it stays as it is.

Self-pruning (`rank-decay` gamma below 1): sites add

    lambda sum_modules ||B_i[:, k:]||_F ||A_i[k:, :]||_F,   k = floor(gamma r_i)

to their loss (lambda: `rank-penalty`), and one at whose end of the visit this sum is smaller than
at its start goes on at rank k, for good. The server compares what it sent with what it received,
and sends the site k ranks from then on; so the paper's rule needs no message of its own. The ranks
survive a resume. The mean rank of a round's sites is reported as `site-rank`.

Memory grows with the cohort: all replies are kept until the round ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.product import trained
from grandrounds.server.aggregation.replies import Reply, ReplyRule
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import A, Adapter, B, kept_ranks, rank_of
from grandrounds.wire.low_rank import modules

RANK = "rank"
"""State carried from round to round, by partition."""


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Heterogeneous(config.rank_decay)


class Heterogeneous(ReplyRule):
    """The mean of zero-padded factors, weighted by the norms of the sites' models.

    Parameters
    ----------
    decay : float
        Share of its ranks that a site keeps when it prunes; 1: none does.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._ranks: dict[int, int] = {}

    def result(self) -> Adapter:
        """Return the weighted mean; note which sites have pruned ranks."""
        replies = self.replies()
        norms = np.sqrt([square_of(reply) for reply in replies])
        total = norms.sum()
        shares = norms / total if total else np.full(len(replies), 1 / len(replies))
        out = dict(self._adapter)
        for module in modules(self._adapter):
            a = np.zeros(self._adapter[module + A].shape)  # (rank, in)
            b = np.zeros(self._adapter[module + B].shape)  # (out, rank)
            most = 0
            for share, reply in zip(shares, replies, strict=True):
                own_a, own_b = trained(reply, module + A), trained(reply, module + B)
                a[: len(own_a)] += share * own_a
                b[:, : len(own_a)] += share * own_b
                most = max(most, len(own_a))
            a[most:], b[:, most:] = self._adapter[module + A][most:], out[module + B][:, most:]
            out[module + A], out[module + B] = a.astype(np.float32), b.astype(np.float32)
        ranks = {site: rank_of(reply.received) for site, reply in self._kept.items()}
        self._report = {"site-rank": float(np.mean(list(ranks.values())))}
        for site, reply in self._kept.items():
            kept = kept_ranks(ranks[site], self._decay)
            if kept < ranks[site] and tail(reply, kept, after=True) < tail(reply, kept):
                self._ranks[site] = kept
        self._kept = {}
        return out

    def ranks(self) -> dict[int, int]:
        """Return the ranks of the sites that have pruned."""
        return dict(self._ranks)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the ranks of the sites that have pruned, as `rank/<partition>`."""
        return {f"{RANK}/{p}": np.array([rank], np.float32) for p, rank in self._ranks.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the ranks of an earlier instance."""
        self._ranks = {int(name[len(RANK) + 1 :]): int(value[0]) for name, value in state.items()}


def square_of(reply: Reply) -> float:
    """Return ||B A||_F^2 of a site's model, over all modules."""
    found = 0.0
    for module in modules(reply.received):
        a, b = trained(reply, module + A), trained(reply, module + B)
        found += float(np.sum((b.T @ b) * (a @ a.T)))
    return max(found, 0.0)


def tail(reply: Reply, first: int, *, after: bool = False) -> float:
    """Return the sum over modules of ||B[:, first:]|| ||A[first:]|| before or after the visit."""
    found = 0.0
    for module in modules(reply.received):
        a, b = (
            trained(reply, name) if after else reply.received[name].astype(np.float64)
            for name in (module + A, module + B)
        )
        found += float(np.linalg.norm(b[:, first:]) * np.linalg.norm(a[first:]))
    return found
