"""The common part of FedAdam, FedYogi and FedAdagrad: their settings, checked.

Reddi et al., Adaptive Federated Optimization (ICLR 2021), algorithm 2. With D_t = sum_i p_i d_i,

    m_t = beta_1 m_{t-1} + (1 - beta_1) D_t
    w_next = w + eta m_t / (sqrt(v_t) + tau)

with v_t defined by each rule; m and v start at 0 (in the paper, v starts at tau^2 or above). eta
defaults to tau: changes small relative to tau then move w as in FedAvg, after the momentum of m,
and larger ones by at most about tau. The paper averages with equal weights, Flower with p_i. m and
v survive a resume. Besides the replies, the server stores these two adapters.
"""

from __future__ import annotations

from typing import Any

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.flower_rule import require


def arguments(config: StrategyConfig) -> dict[str, Any]:
    """Return eta and tau, checked, under Flower's names; eta defaults to tau."""
    rate, tau = config.server_learning_rate, config.tau
    require(rate >= 0, "server-learning-rate", rate, "0 (default) or above")
    require(tau > 0, "tau", tau, "above 0")
    return {"eta": rate or tau, "tau": tau}


def betas(config: StrategyConfig) -> dict[str, Any]:
    """Return the decay rates of both moments, checked, under Flower's names."""
    require(0 <= config.beta_1 < 1, "beta-1", config.beta_1, "from 0 to below 1")
    require(0 <= config.beta_2 < 1, "beta-2", config.beta_2, "from 0 to below 1")
    return {"beta_1": config.beta_1, "beta_2": config.beta_2}
