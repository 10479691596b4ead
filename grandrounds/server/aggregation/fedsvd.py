"""FedSVD: sites train B alone, and after each round an SVD of B A makes A follow what was learned.

    B_mean = B + sum_i p_i dB_i,   U S V^T = B_mean A,   A_next = V^T,   B_next = U S

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA (NeurIPS
2025). Since A is the same at all sites, the mean of the models is exact, as under FFA-LoRA, and the
SVD changes the factors, not their product. It needs no (out, in) matrix (see `low_rank`). The rows
of A are orthonormal from the first round on, so the gradient of B is no longer than that of B A;
where B A has a lower rank than A, the other rows continue A's. The paper's code also has a longer
period between decompositions, which is one round here.

The uplink needs half the bytes of FedAvg, the downlink all. Memory is that of `WeightedMean` over
B, whatever the cohort; the SVD needs, module by module, a few float64 arrays of (out + in, rank).
"""

from __future__ import annotations

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import A, Adapter, B
from grandrounds.wire.low_rank import best_product, factors, modules


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Orthonormal(config.name)


class Orthonormal(Average):
    """The mean of B, with A and B replaced by the orthonormal factors of their product."""

    def result(self) -> Adapter:
        """Return the same product as FFA-LoRA's, with orthonormal rows of A."""
        out = dict(super().result())
        for module in modules(out):
            a, b = out[module + A], out[module + B]
            best = best_product([(1.0, b, a)], len(a))
            out[module + A], out[module + B] = factors(best, len(a), a, "orthonormal")
        return out
