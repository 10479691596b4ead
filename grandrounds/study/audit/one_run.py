"""Lower bounds of ε from one run: Steinke, Nasr and Jagielski, Privacy auditing with one (1)
training run, 2023.

Each of m canaries is put in or left out by a fair coin of its own. From the result an auditor
guesses the coins of some, and may abstain from others. Under (ε, delta) differential privacy for
each canary, more right guesses than randomised response would have are unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from grandrounds.statistics import CONFIDENCE

SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
"""Shares of the canaries at which guesses are cut at either end. The bound is the best of all cuts,
and each is tested at its part of the error."""

ERROR, SMALL_ERROR = 1 - CONFIDENCE, 0.001
"""Error of a bound, and of one that calls a guarantee broken."""

HIGHEST_EPSILON = 50.0
"""Search limit; the bound that m right guesses of m give is about ln(m / 3)."""

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Bound:
    """What the guesses of one cut show."""

    epsilon: float
    """Lower bound of ε at 95 % confidence, corrected for the number of cuts; 0: none."""
    sure_epsilon: float
    """The same at 99.9 %: of a thousand audits of a right mechanism, at most one exceeds its ε."""
    guesses: int
    """Guesses made, half of them `in`."""
    correct: int
    cuts: int
    """Number of cuts that were tried."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the probability of so many right guesses or more under (ε, delta): theorem 5.2.

    With W ~ Binomial(guesses, e^ε / (1 + e^ε)):
    P[W >= correct] + 2 m delta max_i P[correct > W >= correct - i] / i.

    Parameters
    ----------
    canaries : int
        m: all that were flipped, abstentions included.
    """
    from scipy.stats import binom

    right = 1.0 / (1.0 + math.exp(-epsilon))
    found = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        lower = np.arange(correct - 1, -1, -1)
        below = np.cumsum(binom.pmf(lower, guesses, right))
        steepest = float((below / np.arange(1, correct + 1)).max())
        found += 2.0 * canaries * delta * steepest
    return min(1.0, found)


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, error: float = ERROR
) -> float:
    """Return the largest ε that so many right guesses reject at a level of error; 0: none."""
    if p_value(canaries, guesses, correct, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, HIGHEST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        is_rejected = p_value(canaries, guesses, correct, middle, delta) <= error
        low, high = (middle, high) if is_rejected else (low, middle)
    return low


def one_run_bound(
    scores: Scores, is_in: Flags, delta: float, shares: Sequence[float] = SHARES
) -> Bound:
    """Return the best lower bound of ε over several cuts, each at its part of the error.

    Parameters
    ----------
    scores : float64 array of (canaries)
        Higher: more likely in.
    is_in : bool array of (canaries)
        The coins. They must have been independent and fair, or the bound means nothing.
    shares
        Shares of the canaries that are guessed to be in, and as many out.
    """
    order = np.argsort(-scores, kind="stable")
    number = len(scores)
    best = Bound(0.0, 0.0, 0, 0, len(shares))
    for share in sorted(shares, reverse=True):  # of those that show nothing, that of most guesses
        half = max(1, min(number // 2, round(share * number)))
        correct = int(is_in[order[:half]].sum()) + int((~is_in[order[-half:]]).sum())
        epsilon, sure = (
            lower_bound(number, 2 * half, correct, delta, error / len(shares))
            for error in (ERROR, SMALL_ERROR)
        )
        sure = max(sure, best.sure_epsilon)
        if epsilon > best.epsilon or not best.guesses:
            best = Bound(epsilon, sure, 2 * half, correct, len(shares))
        best = replace(best, sure_epsilon=sure)
    return best


def most_that_shows(canaries: int, delta: float, shares: Sequence[float] = SHARES) -> float:
    """Return the bound if every guess were right: an audit of so many canaries shows no more."""
    half = canaries // 2
    is_in = np.arange(canaries) < half
    scores = np.where(is_in, 1.0, 0.0)
    return one_run_bound(scores, is_in, delta, shares).epsilon
