"""Canaries as gradients: the one-run bound of the mechanism itself, without a model.

Each canary's gradient is a coordinate of its own, as long as the clipping norm or longer. What a
step releases of that coordinate is the canary's score, so the attack is the strongest that there
is against a sum with Gaussian noise.
"""

from __future__ import annotations

import numpy as np
import torch

from grandrounds.site.private.clipping import add_clipped
from grandrounds.site.private.coins import Coins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.visit import released
from grandrounds.study.audit.one_run import Flags, Scores

CHUNK = 256
"""Canaries whose gradients are held at once."""


def simulated(is_in: Flags, noise_multiplier: float, length: float, seed: int) -> Scores:
    """Return what a Gaussian sum of clipping norm 1 releases of each canary.

    Parameters
    ----------
    length : float
        L2 norm of a canary's gradient as it enters the sum: above 1 where the clip is missing.
    """
    noise = np.random.default_rng(seed).normal(0.0, noise_multiplier, len(is_in))
    return np.asarray(length * is_in + noise, dtype=np.float64)


def of_the_product(is_in: Flags, mechanism: Mechanism, length: float, coins: Coins) -> Scores:
    """Return what the product's clip and noise release of each canary, in clipping norms.

    Parameters
    ----------
    length : float
        L2 norm of a canary's gradient before the clip, in clipping norms.
    """
    number = len(is_in)
    total = torch.zeros(number, dtype=torch.float64)
    chosen = np.flatnonzero(is_in)
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        gradients = torch.zeros(len(part), number)
        gradients[torch.arange(len(part)), torch.from_numpy(part)] = (
            length * mechanism.clipping_norm
        )
        add_clipped([total], [gradients], mechanism.clipping_norm)
    out = released(total, mechanism, coins) * mechanism.expected_batch / mechanism.clipping_norm
    return np.asarray(out.numpy(), dtype=np.float64)
