"""LA-LoRA: sites train B and A in turn, step by step, and both are averaged as by FedAvg.

    steps 1, 3, 5, ... of a visit move B,   steps 2, 4, 6, ... move A
    A_next = A + sum_i p_i dA_i,   B_next = B + sum_i p_i dB_i

Liu et al., Rethinking LoRA for Privacy-Preserving Federated Learning in Large Models (ICLR 2026):
moved together, each factor's gradient is of the other's value before its own step. Unlike RoLoRA,
which alternates by round, a visit moves both factors, so that the mean of the factors is not that
of the models, and the error is measured. The paper's low-pass filter, which smooths the noise of
differential privacy in a gradient, is left out: private visits are refused. Memory is that of
`WeightedMean`, whatever the cohort.
"""

from grandrounds.server.aggregation.fedavg import make

__all__ = ["make"]
