"""FedYogi: Yogi at the server (see `adaptive`). Arithmetic: Flower's `FedYogi`.

    v_t = v_{t-1} - (1 - beta_2) D_t^2 sign(v_{t-1} - D_t^2)

Reddi et al. (2021), algorithm 2.
"""

from __future__ import annotations

from flwr.serverapp.strategy import FedYogi

from grandrounds.server.aggregation.adaptive import arguments, betas
from grandrounds.server.aggregation.flower_rule import FlowerRule
from grandrounds.server.aggregation.rule import Rule, RuleSettings


def make(settings: RuleSettings) -> Rule:
    """Return the rule."""
    strategy = FedYogi(**arguments(settings), **betas(settings))
    return FlowerRule(strategy, settings)
