"""What FedAdam, FedYogi and FedAdagrad have in common: their config, checked.

Reddi et al., Adaptive Federated Optimization (ICLR 2021), algorithm 2. With D_t = sum_i p_i d_i,

    m_t = beta_1 m_{t-1} + (1 - beta_1) D_t
    w_next = w + eta m_t / (sqrt(v_t) + tau)

and v_t as each rule says; m and v start at 0 (the paper starts v at tau^2 or above). Where no eta
is set it is tau: changes small beside tau then move w as FedAvg would, after the momentum of m, and
larger ones by about tau at most. The paper averages with equal weights, Flower with p_i. m and v
survive a resume; of its own, on top of the replies, the server keeps these two adapters.
"""

from __future__ import annotations

from typing import Any

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import require, usual


def arguments(config: StrategyConfig) -> dict[str, Any]:
    """Return eta and tau, checked, as Flower names them; eta is usually tau."""
    rate, tau = config.server_learning_rate, config.tau
    require(rate >= 0, "server-learning-rate", rate, "0 (usual) or above")
    require(tau > 0, "tau", tau, "above 0")
    return {"eta": usual(rate, tau), "tau": tau}


def betas(config: StrategyConfig) -> dict[str, Any]:
    """Return the decay of both moments, checked, as Flower names them."""
    require(0 <= config.beta_1 < 1, "beta-1", config.beta_1, "from 0 to below 1")
    require(0 <= config.beta_2 < 1, "beta-2", config.beta_2, "from 0 to below 1")
    return {"beta_1": config.beta_1, "beta_2": config.beta_2}
