"""FedAdam: Adam at the server (see `adaptive`). Computed by Flower's `FedAdam`.

    v_t = beta_2 v_{t-1} + (1 - beta_2) D_t^2
    w_next = w + eta c_t m_t / (sqrt(v_t) + tau),
    c_t = sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))

Reddi et al. (2021), algorithm 2, has no bias correction c_t; Kingma & Ba's Adam (2015, section 2)
has one with t, whereas Flower counts rounds from 1 and uses t + 1: in round 1, with the default
betas, c is 0.74 instead of 1.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedAdam

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.adaptive import arguments, betas
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    strategy = FedAdam(**arguments(config), **betas(config))
    return FlowerRule(strategy, config)
