"""Means, intervals and paired tests of a comparison; SciPy is imported when one is asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95

ROUNDING = 1e-9
"""Differences up to this are rounding: equal ratios of counts, subtracted in float64, differ by
about 1e-16, and one answer in a million questions by 1e-6."""

Result = dict[str, Any]


def estimate(values: Sequence[float]) -> Result:
    """Return mean, interval and n of a figure that was measured once for each seed.

    The interval is Student's, m ± t s / sqrt(n) with n - 1 degrees of freedom ("Student" 1908, "The
    probable error of a mean", Biometrika 6, 1-25); None for a single value.
    """
    mean, error = _mean_and_error(values)
    if error is None:
        return {"mean": mean, "interval": None, "n": len(values)}
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return {"mean": mean, "interval": [mean - half, mean + half], "n": len(values)}


def paired_test(gains: Sequence[float]) -> Result:
    """Return mean, interval, n and the two-sided p of Student's paired test.

    Parameters
    ----------
    gains : sequence of float
        One difference for each pair, above 0 where the federation is better; one within
        `ROUNDING` counts as 0. p is None for one pair, and where all differences are equal: the
        test knows no error then.
    """
    gains = [without_rounding(gain) for gain in gains]
    mean, error = _mean_and_error(gains)
    found = {**estimate(gains), "mean": without_rounding(mean)}
    if not error:
        return {**found, "p": None}
    from scipy.stats import t

    return {**found, "p": 2 * float(t.sf(abs(mean) / error, len(gains) - 1))}


def counted(gains: Sequence[float]) -> Result:
    """Return `paired_test`, and how many pairs are above, below and at 0, up to `ROUNDING`."""
    gains = [without_rounding(gain) for gain in gains]
    return {
        **paired_test(gains),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "equal": sum(gain == 0 for gain in gains),
    }


def without_rounding(difference: float) -> float:
    """Return a difference; 0 where it is none but that of rounding."""
    return 0.0 if abs(difference) <= ROUNDING else difference


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for a single value, 0 for equal ones."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    if max(values) - min(values) <= ROUNDING:
        return mean, 0.0
    return mean, statistics.stdev(values) / math.sqrt(len(values))
