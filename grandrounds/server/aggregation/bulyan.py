"""Bulyan: a trimmed mean of the replies that Krum selects. Computed by Flower's `Bulyan`.

    1. select theta = k - 2 f of the k replies by Krum's scores
    2. w_next = w + mean of the theta - 2 f values nearest to the median, coordinate by coordinate

El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium (ICML 2018), section
4. The paper selects one reply at a time and rescores the rest; Flower takes the theta lowest scores
at once. All replies weigh the same. Guaranteed for k >= 4 f + 3 replies with f hostile ones. If
fewer come than that, f is lowered to what k allows; k below 3 raises `RoundError`.
"""

from __future__ import annotations

from flwr.serverapp.strategy import Bulyan

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    hostile = config.num_malicious_nodes
    require(hostile >= 0, "num-malicious-nodes", hostile, "0 or above")
    return FlowerRule(Bulyan(num_malicious_nodes=hostile), config)
