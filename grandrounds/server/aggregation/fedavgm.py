"""FedAvgM: FedAvg with momentum at the server. Arithmetic: Flower's `FedAvgM`.

    v_t = beta v_{t-1} - sum_i p_i d_i,   w_next = w - eta v_t

Hsu et al., Measuring the Effects of Non-Identical Data Distribution (2019), section 4.3, there with
eta = 1, which is usual here too. v survives a resume. Of its own, on top of the replies, the server
keeps one adapter.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvgM

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require, usual
from grandrounds.server.aggregation.rule import Rule

USUAL_SERVER_LEARNING_RATE = 1.0
"""A step as long as FedAvg's, before momentum."""


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    rate, momentum = config.server_learning_rate, config.server_momentum
    require(rate >= 0, "server-learning-rate", rate, "0 (usual) or above")
    require(0 <= momentum < 1, "server-momentum", momentum, "from 0 to below 1")
    strategy = FedAvgM(
        server_learning_rate=usual(rate, USUAL_SERVER_LEARNING_RATE), server_momentum=momentum
    )
    return FlowerRule(strategy, config)
