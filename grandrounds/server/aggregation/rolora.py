"""RoLoRA: B and A are trained alternately, so the mean of the models is exact in every round.

    odd rounds:   B_next = B + sum_i p_i dB_i,   A stays
    even rounds:  A_next = A + sum_i p_i dA_i,   B stays

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA (NeurIPS
2025). B, which starts at zero, comes first: until it has moved, A has no gradient. The uplink needs
half the bytes of FedAvg. Memory is that of `WeightedMean` over what is trained, whatever the
cohort.
"""

from grandrounds.server.aggregation.fedavg import make

__all__ = ["make"]
