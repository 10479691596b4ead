"""FFA-LoRA: A stays frozen and B is averaged, so that the mean of the models is exact.

    B_next = B + sum_i p_i dB_i,   so   B_next A = sum_i p_i (B_i A)

Sun et al., Improving LoRA in Privacy-preserving Federated Learning (ICLR 2024). The uplink needs
half the bytes of FedAvg. Memory is that of `WeightedMean` over B, whatever the cohort.
"""

from grandrounds.server.aggregation.fedavg import make

__all__ = ["make"]
