"""FedAdagrad: Adagrad at the server (see `adaptive`). Computed by Flower's `FedAdagrad`.

    v_t = v_{t-1} + D_t^2

Reddi et al. (2021), algorithm 2; Flower fixes beta_1 = 0, so that m_t = D_t.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAdagrad

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.adaptive import arguments
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return FlowerRule(FedAdagrad(**arguments(config)), config)
