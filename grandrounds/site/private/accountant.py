"""The ε of private visits, by the privacy loss distribution (PLD) of Google's dp-accounting.

PLD (Koskela et al., 2020; Doroshenko et al., 2022) composes the steps of a run numerically and
rounds up, so ε is an upper bound at any grid; a coarser one is looser and quicker. Rényi accounting
is an upper bound too, 10 to 20 % looser: it brackets the search for a noise multiplier, and
stands for PLD where ε is beyond every budget and PLD would take minutes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from grandrounds.config.keys import PrivacyConfig
from grandrounds.config.private import LEAST_NOISE
from grandrounds.errors import ConfigError
from grandrounds.site.private.mechanism import BESIDE_LOSS, Mechanism

MOST_NOISE = 1e4
TOLERANCE = 1e-3
"""Relative precision of a calibrated noise multiplier."""

FINE, COARSE, RENYI = 1e-4, 1e-3, 0.0
"""Spacing of PLD's grid of privacy losses; with the coarse one, ε of 8 is 3e-5 larger. 0: Rényi's
orders in its place."""

LITTLE_NOISE = 0.5
"""Noise multiplier below which the fine grid would have millions of points (21 s at 0.3)."""

MOST_STEPS = 10**6
"""Steps of a site in a run, as many as a site may allow; ten times as many take PLD 36 s."""

BEYOND = 60.0
"""Rényi's ε from which on PLD is not asked: no budget allows it."""


def epsilon_of(mechanism: Mechanism, visits: int | None = None) -> float:
    """Return the ε that a number of visits spend, at the mechanism's delta.

    Parameters
    ----------
    visits : int, optional
        Visits so far; by default all of the run.

    Raises
    ------
    ConfigError
        If dp-accounting is not installed.
    """
    return _epsilon_of(mechanism, mechanism.visits if visits is None else visits, FINE)


def _epsilon_of(mechanism: Mechanism, visits: int, grid: float) -> float:
    if not visits:
        return 0.0
    steps = mechanism.steps * visits
    noise = mechanism.joint_noise_multiplier
    return epsilon(noise, mechanism.sampling_rate, steps, mechanism.delta, grid)


def visits_within(mechanism: Mechanism, most_epsilon: float) -> int:
    """Return how many visits, at most all, spend at most an ε; raises as `epsilon_of`."""
    if epsilon_of(mechanism) <= most_epsilon:
        return mechanism.visits
    low, high = 0, mechanism.visits
    while high - low > 1:
        middle = (low + high) // 2
        is_within = _epsilon_of(mechanism, middle, COARSE) <= most_epsilon
        low, high = (middle, high) if is_within else (low, middle)
    if high < mechanism.visits and epsilon_of(mechanism, high) <= most_epsilon:
        return high
    return low


def noise_for(privacy: PrivacyConfig, mechanism: Mechanism) -> Mechanism:
    """Return a mechanism with the noise that a recipe asks for, or that its target takes.

    Raises
    ------
    ConfigError
        As for `calibrated`.
    """
    noise = privacy.noise_multiplier
    if not noise:
        steps, target = mechanism.all_steps, privacy.target_epsilon
        noise = calibrated(target, mechanism.sampling_rate, steps, mechanism.delta)
        noise *= BESIDE_LOSS if mechanism.tells_loss else 1.0
    return replace(mechanism, noise_multiplier=noise)


@lru_cache(maxsize=256)
def calibrated(target_epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Return the smallest noise multiplier, to 0.1 %, at which all steps spend at most ε.

    Raises
    ------
    ConfigError
        If no multiplier from 0.3 to 10,000 does, there are too many steps, or dp-accounting is not
        installed.
    """
    _check_steps(steps)

    from scipy.optimize import brentq  # only here: it takes longer to load than most answers

    def excess(log_noise: float, grid: float) -> float:
        spent = epsilon(math.exp(log_noise), sampling_rate, steps, delta, grid)
        return math.log(max(spent, 1e-12) / target_epsilon)

    low, high = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    if excess(high, RENYI) > 0:
        raise ConfigError(
            f"No noise reaches ε = {target_epsilon:g} at delta = {delta:g} with {steps} steps at a "
            f"sampling rate of {sampling_rate:g}: raise the target, or train fewer steps."
        )
    # Rényi's bound is above PLD's, so this is enough, and often more than enough.
    high = brentq(excess, low, high, (RENYI,), 0.01) if excess(low, RENYI) > 0 else low
    high, low = high + 0.01, max(low, high - 0.35)
    grid = COARSE if target_epsilon >= 1 else FINE
    found = brentq(excess, low, high, (grid,), TOLERANCE / 2) if excess(low, grid) > 0 else low
    while excess(found, grid) > 0:
        found += TOLERANCE / 2
    return math.exp(found)


ORDERS = (*range(2, 65), *(2**power for power in range(7, 12)))
"""Orders of Rényi's divergence; for integers alone its sum is finite and exact."""


@lru_cache(maxsize=1024)
def epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, grid: float = FINE
) -> float:
    """Return the ε of a number of Poisson-sampled Gaussian steps.

    Parameters
    ----------
    grid : float
        Spacing of PLD's privacy losses; 0: by Rényi's orders.

    Raises
    ------
    ConfigError
        If there are too many steps, or dp-accounting is not installed.
    """
    _check_steps(steps)
    library = _library()
    event = library.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        event = library.PoissonSampledDpEvent(sampling_rate, event)
    neighbours = library.NeighboringRelation.ADD_OR_REMOVE_ONE
    if grid:
        by_orders = epsilon(noise_multiplier, sampling_rate, steps, delta, RENYI)
        if by_orders > BEYOND:
            return by_orders
        spacing = grid if noise_multiplier >= LITTLE_NOISE else max(grid, COARSE)
        accountant = library.pld.PLDAccountant(neighbours, value_discretization_interval=spacing)
    else:
        accountant = library.rdp.RdpAccountant(ORDERS, neighbours)
    accountant.compose(library.SelfComposedDpEvent(event, steps))
    found = float(accountant.get_epsilon(delta))
    # Both are upper bounds, and PLD's tails give infinity at a delta below 1e-15.
    return min(found, by_orders) if grid else found


def _check_steps(steps: int) -> None:
    if steps > MOST_STEPS:
        raise ConfigError(
            f"{steps:,} private steps of a site, visits x steps of a visit, are too many: at most "
            f"{MOST_STEPS:,} are accounted for, and no site allows more. Lower num-server-rounds "
            "or train.training-arguments.max-steps."
        )


def accountant_name() -> str:
    """Return the library that computes ε, its version and the method."""
    return f"dp-accounting {version('dp-accounting')}, PLD"


def check_installed() -> None:
    """Raise `ConfigError` if dp-accounting is not installed."""
    _library()


def _library() -> Any:
    """Return dp-accounting.

    Raises
    ------
    ConfigError
        If it is not installed: without an accountant nothing is called private.
    """
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Private visits need dp-accounting, which computes ε: pip install "
            "'grandrounds[privacy]'."
        ) from error
    # Orders of little use are left out with a warning each, which only loosens the bound.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return dp_accounting
