"""FFA-LoRA: A stays as it was drawn, B is averaged, so that the mean of the models is exact.

    B_next = B + sum_i p_i dB_i,   so   B_next A = sum_i p_i (B_i A)

Sun et al., Improving LoRA in Privacy-preserving Federated Learning (ICLR 2024). Half the bytes of
FedAvg travel up. Memory is that of `WeightedMean` over B, whatever the cohort.
"""

from __future__ import annotations

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Average(config.name)
