"""FedMedian: the median of every coordinate. Arithmetic: Flower's `FedMedian`.

    w_next = w + median_i d_i,   coordinate by coordinate

Yin et al., Byzantine-Robust Distributed Learning (ICML 2018), definition 1. Numbers of examples
play no part. Stays within the range of the honest replies, in every coordinate, while fewer than
half of the replies are hostile; where sites differ much, the median is not their mean.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedMedian

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return FlowerRule(FedMedian(), config)
