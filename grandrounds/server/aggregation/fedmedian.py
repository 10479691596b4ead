"""FedMedian: the coordinate-wise median. Computed by Flower's `FedMedian`.

    w_next = w + median_i d_i,   coordinate by coordinate

Yin et al., Byzantine-Robust Distributed Learning (ICML 2018), definition 1. All replies
weigh the same. Stays within the range of the honest replies in every coordinate as long as fewer
than half of the replies are hostile. On heterogeneous sites the median differs from the mean.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedMedian

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return FlowerRule(FedMedian(), config)
