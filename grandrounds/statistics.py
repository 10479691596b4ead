"""Intervals and tests of the accuracies that Grand Rounds reports.

SciPy is imported when a figure is asked for, so that importing this module costs nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any


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
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


# --- Two models on the same items -----------------------------------------------------------------


@dataclass(frozen=True)
class PairedComparison:
    """Two models asked the same items, the first usually being the untouched base."""

    n: int
    """Items asked."""
    both_correct: int
    """Items that both answered rightly."""
    only_first: int
    """Items that only the first answered rightly."""
    only_second: int
    """Items that only the second answered rightly."""
    neither: int
    """Items that neither answered rightly."""
    difference: float
    """Accuracy of the second minus accuracy of the first, a fraction from -1 to 1."""
    interval: tuple[float, float]
    """Bounds of the difference at the confidence asked for: Newcombe's method 10."""
    p_value: float
    """McNemar's exact two-sided p: how likely so lopsided a split is if neither is better."""


def compare_paired(
    first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95
) -> PairedComparison:
    """Compare two models item by item.

    The test is McNemar's in its exact form: of the items that only one of the two got right, each
    is either's with probability 1/2 if they are equally good (McNemar 1947, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 12,
    153-157). With no such item p is 1. Interval and test are different methods, and near p = 0.05
    one may exclude equality where the other does not.

    Parameters
    ----------
    first, second : sequence of bool
        Whether each item was answered rightly; both in the same order of items.
    confidence : float
        Of the interval; between 0 and 1, both excluded.

    Returns
    -------
    PairedComparison
        With `difference` = second - first.

    Raises
    ------
    ValueError
        If there are no items, the lengths differ, or `confidence` is out of its range.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"cannot pair {len(first)} with {len(second)} items: both need the same, at least 1"
        )
    from scipy.stats import binomtest

    cells = Counter((bool(one), bool(other)) for one, other in zip(first, second, strict=True))
    both, only_first = cells[True, True], cells[True, False]
    only_second, neither = cells[False, True], cells[False, False]
    discordant = only_first + only_second
    return PairedComparison(
        n=len(first),
        both_correct=both,
        only_first=only_first,
        only_second=only_second,
        neither=neither,
        difference=(only_second - only_first) / len(first),
        interval=_newcombe_interval(both, only_first, only_second, neither, confidence),
        p_value=float(binomtest(only_second, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def _newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float
) -> tuple[float, float]:
    """Return the interval of (second - first) from the four cells of the paired table.

    Method 10 of Newcombe (1998), "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, 2635-2650. The distances of the
    Wilson bounds from the two accuracies are combined like standard deviations of correlated
    variables; their correlation phi is the table's, its numerator moved towards 0 by n/2 if
    positive. The bounds never leave [-1, 1], nor is the interval of width 0 if no item differs.
    """
    n = both + only_first + only_second + neither
    right_first, right_second = both + only_first, both + only_second
    first, second = right_first / n, right_second / n
    low_first, high_first = wilson_interval(right_first, n, confidence)
    low_second, high_second = wilson_interval(right_second, n, confidence)

    covariance = both * neither - only_first * only_second
    corrected = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
    margins = right_first * (n - right_first) * right_second * (n - right_second)
    phi = corrected / sqrt(margins) if margins else 0.0

    def combined(distance: float, other: float) -> float:
        return sqrt(max(distance**2 - 2 * phi * distance * other + other**2, 0.0))

    difference = second - first
    return (
        difference - combined(second - low_second, high_first - first),
        difference + combined(high_second - second, first - low_first),
    )


# --- Several benchmarks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AverageAccuracy:
    """The mean accuracy over benchmarks, each counting the same."""

    benchmarks: tuple[str, ...]
    """The benchmarks that went into it."""
    accuracy: float
    """Unweighted mean of their accuracies, a fraction from 0 to 1."""
    interval: tuple[float, float]
    """Its bounds at the confidence asked for."""


def average_accuracy(
    rows: Mapping[str, tuple[int, int]], confidence: float = 0.95
) -> AverageAccuracy:
    """Average over the benchmarks run as the leaderboard does: a benchmark counts once.

    A benchmark of 500 items so weighs as much as one of 5,000. The interval combines the Wilson
    bounds l, u of the k independent accuracies p: mean(p) - sqrt(sum((p - l)²)) / k and
    mean(p) + sqrt(sum((u - p)²)) / k. Zou, Huang and Zhang (2009), "A note on confidence interval
    estimation for a linear function of binomial proportions", Computational Statistics & Data
    Analysis 53, 1080-1085. For one benchmark this is Wilson's interval; unlike the normal
    approximation it stays within 0 and 1 and keeps a width at 0 % and 100 %. It speaks of new
    questions to these benchmarks, not of other benchmarks.

    Parameters
    ----------
    rows : mapping of str to (int, int)
        Benchmark → questions answered rightly and questions asked; not empty.
    confidence : float
        Between 0 and 1, both excluded.

    Returns
    -------
    AverageAccuracy
        Which benchmarks it covers, in the order given, mean and interval.

    Raises
    ------
    ValueError
        If there is no benchmark, or counts or confidence are out of their range.
    """
    if not rows:
        raise ValueError("no benchmark was run, so there is no average")
    below = above = total = 0.0
    for correct, n in rows.values():
        low, high = wilson_interval(correct, n, confidence)
        accuracy = correct / n
        total += accuracy
        below += (accuracy - low) ** 2
        above += (high - accuracy) ** 2
    count = len(rows)
    mean = total / count
    return AverageAccuracy(
        tuple(rows), mean, (mean - sqrt(below) / count, mean + sqrt(above) / count)
    )


# --- Order of the options -------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionBias:
    """How the chosen answers are spread over the positions of the options."""

    counts: tuple[int, ...]
    """How often each position was chosen, the first option first."""
    shares: tuple[float, ...]
    """The same as fractions of all choices."""
    p_value: float
    """Pearson's chi-square test of equal shares."""


def position_bias(choices: Sequence[int], options: int) -> PositionBias:
    """Count which position is chosen how often, and test against equal shares.

    Give it answers to items whose options were shuffled: the right answer then stands equally often
    at every position, and so does any answer chosen for what it says, right or wrong. On items in
    their published order a small p may only reflect where the right answers stand. The test
    (Pearson 1900, with `options` - 1 degrees of freedom) takes the choices as independent and wants
    five or more expected at each position. Permutations that bring every option to every position
    once make it conservative.

    Parameters
    ----------
    choices : sequence of int
        Position of each chosen option, from 0; not empty.
    options : int
        Positions there are, at least 2, the same for every item.

    Returns
    -------
    PositionBias
        Counts and shares by position, and p.

    Raises
    ------
    ValueError
        If there are no choices, fewer than two options, or a choice is no position.
    """
    if options < 2 or not len(choices):
        raise ValueError(
            f"no position bias for {len(choices)} choices among {options} options: "
            "needs at least 1 choice and 2 options"
        )
    outside = next((choice for choice in choices if not 0 <= choice < options), None)
    if outside is not None:
        raise ValueError(f"choice {outside} is no position; allowed: 0 to {options - 1}")
    from scipy.stats import chisquare

    found = Counter(int(choice) for choice in choices)
    counts = tuple(found[position] for position in range(options))
    return PositionBias(
        counts=counts,
        shares=tuple(count / len(choices) for count in counts),
        p_value=float(chisquare(counts).pvalue),
    )


@dataclass(frozen=True)
class ShuffledAccuracy:
    """Accuracy on the same items under several orders of their options."""

    n: int
    """Items, each asked once per permutation."""
    correct: tuple[int, ...]
    """Items answered rightly under each permutation."""
    mean: float
    """Mean accuracy over the permutations, a fraction like all below."""
    minimum: float
    """Accuracy under the worst permutation."""
    maximum: float
    """Accuracy under the best permutation."""
    always_correct: int
    """Items answered rightly under every permutation."""
    always_correct_share: float
    """The same as a fraction of the items; no guess survives many permutations."""


def shuffled_accuracy(correct_by_permutation: Sequence[Sequence[bool]]) -> ShuffledAccuracy:
    """Summarise accuracy over permutations of the options.

    Guessing among m options under k independent permutations gets an item right every time with
    probability m^-k. An interval of `always_correct` of `n` is Wilson's; the mean has none here,
    since answers to one item under several permutations are not independent.

    Parameters
    ----------
    correct_by_permutation : sequence of sequences of bool
        For each permutation, whether each item was answered rightly; same items, same order.

    Returns
    -------
    ShuffledAccuracy
        Counts, mean, minimum and maximum, and the items that are right every time.

    Raises
    ------
    ValueError
        If there is no permutation or no item, or the permutations differ in length.
    """
    lengths = sorted({len(answers) for answers in correct_by_permutation})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            f"{len(correct_by_permutation)} permutations of {lengths or 'no'} items: "
            "needs at least one permutation, and the same items, at least 1, in each"
        )
    n = lengths[0]
    correct = tuple(sum(map(bool, answers)) for answers in correct_by_permutation)
    always = sum(all(answers) for answers in zip(*correct_by_permutation, strict=True))
    return ShuffledAccuracy(
        n=n,
        correct=correct,
        mean=sum(correct) / (n * len(correct)),
        minimum=min(correct) / n,
        maximum=max(correct) / n,
        always_correct=always,
        always_correct_share=always / n,
    )


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
