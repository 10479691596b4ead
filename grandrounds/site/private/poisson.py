"""Poisson sampling: each unit is drawn for a step on its own, by the site's secret coins.

The amplification that the accountant claims holds for this sampler only, and only while the draws
are secret. A cursor that goes through shuffled data in order is not Poisson sampling: at a claimed
ε of 8 it may spend 21 (Chua et al., How private are DP-SGD implementations?, 2024).
"""

from __future__ import annotations

from grandrounds.site.private.coins import Coins


def drawn_units(num_units: int, rate: float, coins: Coins) -> list[int]:
    """Return the units of a step, in ascending order: any number of them, none included.

    Parameters
    ----------
    num_units : int
        Units that the site really has. It is not the public, declared number.
    rate : float
        Probability with which each unit is drawn.
    """
    return [int(unit) for unit in (coins.uniforms(num_units) < rate).nonzero()[0]]
