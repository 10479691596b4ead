"""The attacks of `hostile.py`: what a hostile site sends in place of its update; no script itself.

Hostile sites know one another and, where an attack needs it, the updates of all honest sites of
the round. Updates are vectors in float64: h_i of the honest sites, m their mean, s their standard
deviation per coordinate; u is what the site would have sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

BOUND = 3.0
"""The product's default of `defence.largest-norm`; longer updates are shortened by the server."""


@dataclass(frozen=True)
class Situation:
    """What a hostile site knows when it sends."""

    own: Vector
    """What it would have sent, (values,); of zeros if the attack needs no training."""
    honest: NDArray[np.float64]
    """The honest updates, (sites, values)."""
    progress: Vector
    """The received adapter minus the first one, (values,)."""
    module: NDArray[np.bool_]
    """The values of the one module that `one-module` attacks, (values,)."""
    number: int
    """Which of the hostile sites, from 0."""
    seed: int
    """Of the random choices, of site and round."""


def flip(now: Situation) -> Vector:
    """-u."""
    return -now.own


def scaled(now: Situation) -> Vector:
    """-10 u."""
    return -10 * now.own


def noise(now: Situation) -> Vector:
    """Gaussian noise, as long as the default norm bound allows."""
    drawn = np.random.default_rng(now.seed).normal(size=now.own.shape)
    return _of_length(drawn, BOUND * _usual(now))


def alie(now: Situation) -> Vector:
    """m - z s (Baruch et al., A Little Is Enough, NeurIPS 2019, algorithm 3), with z = 1.5.

    The paper's z for 2 of 7 is 0.25, which changes next to nothing.
    """
    return now.honest.mean(axis=0) - 1.5 * now.honest.std(axis=0)


def inner_product(now: Situation) -> Vector:
    """-3 m (Xie et al., Fall of Empires, UAI 2019, with epsilon = 3): two of seven reverse m."""
    return -3 * now.honest.mean(axis=0)


def one_module(now: Situation) -> Vector:
    """U, but for one module, where it is -10 u."""
    return np.where(now.module, -10 * now.own, now.own)


def adaptive(now: Situation) -> Vector:
    """Against the progress so far, as long as the norm bound allows, at right angles to m.

    Its cosine to the mean of the others is just above 0, so that it passes bound and cosine screen
    at their settings in the documentation. In the first round, against s.
    """
    mean = now.honest.mean(axis=0)
    against = -now.progress if np.any(now.progress) else -now.honest.std(axis=0)
    mean = mean / np.linalg.norm(mean)
    across = against - (against @ mean) * mean
    across = across / np.linalg.norm(across)
    return _of_length(across + 0.05 * mean, 0.99 * BOUND * _usual(now))


def within_bounds(now: Situation) -> Vector:
    """As `adaptive`, knowing the preset: no longer than usual, and apart from the other hostile.

    A part of noise, which each hostile site draws for itself, hides that they agree.
    """
    drawn = np.random.default_rng(now.seed).normal(size=now.own.shape)
    toward = adaptive(now)
    direction = _of_length(toward, 1.0) + _of_length(drawn, 1.0)
    return _of_length(direction, _usual(now))


def min_max(now: Situation) -> Vector:
    """m - gamma s, as far as keeps it among the honest (Shejwalkar & Houmansadr, NDSS 2021).

    The largest gamma with which it is no farther from any honest update than the two honest ones
    that are farthest apart (equation 4, with the direction -s).
    """
    mean, spread = now.honest.mean(axis=0), now.honest.std(axis=0)
    apart = max(float(np.linalg.norm(now.honest - one, axis=1).max()) for one in now.honest)
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        sent = mean - middle * spread
        fits = float(np.linalg.norm(now.honest - sent, axis=1).max()) <= apart
        low, high = (middle, high) if fits else (low, middle)
    return mean - low * spread


Attack = Callable[[Situation], Vector]

ATTACKS: dict[str, Attack] = {
    "flip": flip,
    "scaled": scaled,
    "noise": noise,
    "alie": alie,
    "inner-product": inner_product,
    "claims": flip,
    "one-module": one_module,
    "adaptive": adaptive,
    "within-bounds": within_bounds,
    "min-max": min_max,
}
"""Name → update; `labels` trains as honest sites do, on false answers."""

TRAINS = ("flip", "scaled", "claims", "one-module", "labels")
"""Attacks whose sites train first."""

HELD_BACK = "min-max"
"""Run only once the preset was fixed."""


def _usual(now: Situation) -> float:
    return float(np.median(np.linalg.norm(now.honest, axis=1)))


def _of_length(vector: Vector, length: float) -> Vector:
    return vector * (length / np.linalg.norm(vector))
