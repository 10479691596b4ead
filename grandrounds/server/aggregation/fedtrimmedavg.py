"""FedTrimmedAvg: the coordinate-wise trimmed mean. Computed by Flower's `FedTrimmedAvg`.

    w_next = w + mean of d_i without the floor(beta k) smallest and largest, of k replies,
    coordinate by coordinate

Yin et al., Byzantine-Robust Distributed Learning (ICML 2018), definition 2. All replies weigh the
same. Stays within the range of the honest replies in every coordinate as long as at most floor(beta
k) are hostile. Of fewer replies than that trims, one is trimmed at each end, whereas Flower would
return the plain mean; fewer than 3 raise `RoundError`.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedTrimmedAvg

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    share = config.trimmed_share
    require(0 <= share < 0.5, "trimmed-share", share, "from 0 to below 0.5")
    return FlowerRule(FedTrimmedAvg(beta=share), config)
