"""FedProx: FedAvg at the server; the proximal term is in the sites' training.

Li et al. (2020), algorithm 2.
"""

from grandrounds.server.aggregation.fedavg import make

__all__ = ["make"]
