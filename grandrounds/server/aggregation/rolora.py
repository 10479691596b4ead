"""RoLoRA: B and A are trained in turn, so that the mean of the models is exact in every round.

    odd rounds:   B_next = B + sum_i p_i dB_i,   A stays
    even rounds:  A_next = A + sum_i p_i dA_i,   B stays

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA (NeurIPS
2025). B, which starts as zero, comes first: before it has moved, A has no gradient. Half the bytes
of FedAvg travel up. Memory is that of `WeightedMean` over what is trained, whatever the cohort.
"""

from __future__ import annotations

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.rule import Rule


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Average(config.name)
