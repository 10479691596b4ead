"""Confidence intervals of the accuracies that Grand Rounds reports."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of an accuracy.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22, 209-212; no continuity correction.

    Parameters
    ----------
    correct : int
        Questions answered rightly, from 0 to `n`.
    n : int
        Questions asked, at least 1.
    confidence : float
        Between 0 and 1, both excluded.

    Returns
    -------
    tuple of float
        Lower and upper bound, as fractions from 0 to 1.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"no interval for {correct} of {n}: needs n >= 1 and 0 <= correct <= n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)
