"""Krum: the single reply nearest to its neighbours. Computed by Flower's `Krum`.

    score_i = sum of |d_i - d_j|^2 over the k - f - 2 nearest d_j,   w_next = w + d_argmin(score)

Blanchard et al., Machine Learning with Adversaries (NeurIPS 2017), section 4. All replies weigh
the same, and all but one are discarded. Guaranteed for k >= 2 f + 3 replies with f hostile ones. If
fewer come than that, f is lowered to what k allows; k below 3 raises `RoundError`.
"""

from __future__ import annotations

from flwr.serverapp.strategy import Krum

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    hostile = config.num_malicious_nodes
    require(hostile >= 0, "num-malicious-nodes", hostile, "0 or above")
    return FlowerRule(Krum(num_malicious_nodes=hostile), config)
