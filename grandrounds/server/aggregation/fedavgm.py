"""FedAvgM: FedAvg with momentum at the server. Computed by Flower's `FedAvgM`.

    v_t = beta v_{t-1} - sum_i p_i d_i,   w_next = w - eta v_t

Hsu et al., Measuring the Effects of Non-Identical Data Distribution (2019), section 4.3, with
eta = 1, which is the default here too. v survives a resume. Besides the replies, the server stores
one adapter.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvgM

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require
from grandrounds.server.aggregation.rule import Rule

USUAL_SERVER_LEARNING_RATE = 1.0
"""A step as long as FedAvg's, before momentum."""


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    rate, momentum = config.server_learning_rate, config.server_momentum
    require(rate >= 0, "server-learning-rate", rate, "0 (default) or above")
    require(0 <= momentum < 1, "server-momentum", momentum, "from 0 to below 1")
    eta = rate or USUAL_SERVER_LEARNING_RATE
    return FlowerRule(FedAvgM(server_learning_rate=eta, server_momentum=momentum), config)
