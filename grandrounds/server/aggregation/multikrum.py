"""Multi-Krum: the mean of the m replies with Krum's lowest scores, by Flower's `MultiKrum`.

    w_next = w + sum over the m selected of (n_i / their n) d_i,   scores as in `krum`

Blanchard et al., Machine Learning with Adversaries (NeurIPS 2017), section 4; the paper averages
with equal weights, Flower by number of examples, so a hostile reply that is selected has the weight
of its examples. Guaranteed for k >= 2 f + 3 and k >= m + f replies with f hostile ones. If fewer
come than that, f and m are lowered to what k allows; k below 3 raises `RoundError`.
"""

from __future__ import annotations

from flwr.serverapp.strategy import MultiKrum

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import FlowerRule, require
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    hostile, selected = config.num_malicious_nodes, config.num_nodes_to_select
    require(hostile >= 0, "num-malicious-nodes", hostile, "0 or above")
    require(selected >= 1, "num-nodes-to-select", selected, "1 or above")
    strategy = MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=selected)
    return FlowerRule(strategy, config)
