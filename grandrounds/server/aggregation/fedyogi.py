"""FedYogi: Yogi at the server (see `adaptive`). Computed by Flower's `FedYogi`.

    v_t = v_{t-1} - (1 - beta_2) D_t^2 sign(v_{t-1} - D_t^2)

Reddi et al. (2021), algorithm 2.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedYogi

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.adaptive import arguments, betas
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    strategy = FedYogi(**arguments(config), **betas(config))
    return FlowerRule(strategy, config)
