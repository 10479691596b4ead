"""Krum: one reply, the one nearest to its neighbours, is taken. Arithmetic: Flower's `Krum`.

    score_i = sum of |d_i - d_j|^2 over the k - f - 2 nearest d_j,   w_next = w + d_argmin(score)

Blanchard et al., Machine Learning with Adversaries (NeurIPS 2017), section 4. Numbers of examples
play no part, and all other replies are lost. Holds for k >= 2 f + 3 replies with f hostile ones; a
smaller k is an error (`RoundError`), where Flower would go on.
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
