"""Confidence intervals and tests for accuracies and for figures measured once per seed.

SciPy is imported on use, and not for Wilson's interval, which every run prints: importing it takes
a tenth of a run's start.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

CONFIDENCE = 0.95
"""Confidence level of all intervals."""


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of an accuracy, as fractions from 0 to 1.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22, 209-212; no continuity correction.

    Parameters
    ----------
    correct : int
        Correct answers, from 0 to `n`.
    n : int
        Items, at least 1.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"no interval for {correct} of {n}: needs n >= 1 and 0 <= correct <= n")
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, scale = correct / n, 2 * (n + z**2)
    middle = (2 * n * share + z**2) / scale
    half = z / scale * sqrt(4 * n * share * (1 - share) + z**2)
    return (middle - half if correct else 0.0), (middle + half if correct < n else 1.0)


# --- Two models on the same items -----------------------------------------------------------------


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same items; the first is usually the base."""

    n: int
    """Number of items."""
    only_first: int
    """Items that only the first answered correctly."""
    only_second: int
    """Items that only the second answered correctly."""
    difference: float
    """Accuracy of the second minus accuracy of the first, a fraction from -1 to 1."""
    interval: tuple[float, float]
    """95 % interval of the difference: Newcombe's method 10."""
    p_value: float
    """McNemar's exact two-sided p."""


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compare two models item by item.

    The test is McNemar's exact test: of the items that only one of the two answered correctly, each
    is either's with probability 1/2 if both are equally good (McNemar 1947, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 12,
    153-157). Without any such item p is 1. Interval and test are different methods: near p = 0.05,
    one may exclude equality where the other does not.

    Parameters
    ----------
    first, second : sequence of bool
        Whether each item was answered correctly, in the same order of items.

    Raises
    ------
    ValueError
        If there are no items, or the lengths differ.
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
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / len(first),
        interval=_newcombe_interval(both, only_first, only_second, neither),
        p_value=float(binomtest(only_second, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def _newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[float, float]:
    """Return the interval of (second - first) from the four cells of the paired table.

    Method 10 of Newcombe (1998), "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, 2635-2650. The distances of the
    Wilson bounds from the two accuracies are combined like standard deviations of correlated
    variables. Their correlation is the table's phi, with n/2 subtracted from a positive numerator,
    down to 0. The bounds stay within [-1, 1], and the width is above 0 even if no item differs.
    """
    n = both + only_first + only_second + neither
    right_first, right_second = both + only_first, both + only_second
    first, second = right_first / n, right_second / n
    low_first, high_first = wilson_interval(right_first, n)
    low_second, high_second = wilson_interval(right_second, n)

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


def average_accuracy(counts: Sequence[tuple[int, int]]) -> tuple[float, tuple[float, float]]:
    """Return the unweighted mean accuracy over benchmarks, as on the leaderboard, and its interval.

    A benchmark of 500 items counts as much as one of 5,000. The 95 % interval combines the Wilson
    bounds l, u of the k independent accuracies p: mean(p) - sqrt(sum((p - l)²)) / k and
    mean(p) + sqrt(sum((u - p)²)) / k. Zou, Huang and Zhang (2009), "A note on confidence interval
    estimation for a linear function of binomial proportions", Computational Statistics & Data
    Analysis 53, 1080-1085. For one benchmark it is Wilson's interval; unlike the normal
    approximation, it stays within [0, 1] and keeps a width at 0 % and 100 %. It covers new items of
    these benchmarks, not other benchmarks.

    Parameters
    ----------
    counts : sequence of (int, int)
        Correct answers and items of each benchmark; not empty.

    Raises
    ------
    ValueError
        If there is no benchmark, or a count is out of range.
    """
    if not counts:
        raise ValueError("no benchmark was run, so there is no average")
    below = above = total = 0.0
    for correct, n in counts:
        low, high = wilson_interval(correct, n)
        accuracy = correct / n
        total += accuracy
        below += (accuracy - low) ** 2
        above += (high - accuracy) ** 2
    k = len(counts)
    mean = total / k
    return mean, (mean - sqrt(below) / k, mean + sqrt(above) / k)


# --- Order of the options -------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionBias:
    """Distribution of the chosen options over positions."""

    counts: tuple[int, ...]
    """Number of choices of each position."""
    shares: tuple[float, ...]
    """Fraction of choices of each position."""
    p_value: float
    """Pearson's chi-square test of equal shares."""


def position_bias(choices: Sequence[int], options: int) -> PositionBias:
    """Count how often each position is chosen, and test for equal shares.

    For answers to items with shuffled options: the correct option is then equally likely at every
    position, and so is any option chosen for its content. On items in their published order, a
    small p may only reflect the positions of the correct options. The test (Pearson 1900, with
    `options` - 1 degrees of freedom) assumes independent choices and at least five expected at each
    position. Permutations that put every option at every position once make it conservative.

    Parameters
    ----------
    choices : sequence of int
        Position of each chosen option, from 0; not empty.
    options : int
        Number of options per item, at least 2.

    Raises
    ------
    ValueError
        If there are no choices, fewer than two options, or a choice is out of range.
    """
    if options < 2 or not len(choices):
        raise ValueError(
            f"no position bias for {len(choices)} choices among {options} options: "
            "needs at least 1 choice and 2 options"
        )
    outside = next((choice for choice in choices if not 0 <= choice < options), None)
    if outside is not None:
        raise ValueError(f"choice {outside} is not a position; allowed: 0 to {options - 1}")
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
    """Number of items, each asked once per permutation."""
    correct: tuple[int, ...]
    """Correct answers under each permutation."""
    mean: float
    """Mean accuracy over the permutations, a fraction as all below."""
    minimum: float
    """Accuracy under the worst permutation."""
    maximum: float
    """Accuracy under the best permutation."""
    always_correct: int
    """Items answered correctly under every permutation."""
    always_correct_share: float
    """`always_correct / n`."""


def shuffled_accuracy(correct_by_permutation: Sequence[Sequence[bool]]) -> ShuffledAccuracy:
    """Summarise accuracy over permutations of the options.

    Guessing among m options under k independent permutations answers an item correctly every time
    with probability m^-k. The interval of `always_correct` of `n` is Wilson's; the mean has none,
    because answers to one item under several permutations are not independent.

    Parameters
    ----------
    correct_by_permutation : sequence of sequences of bool
        For each permutation, whether each item was answered correctly; same items, same order.

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


# --- One figure per seed --------------------------------------------------------------------------

ROUNDING = 1e-9
"""Differences up to this are rounding errors: equal ratios of counts, subtracted in float64, differ
by about 1e-16, and one answer in a million questions by 1e-6."""

Result = dict[str, Any]


def estimate(values: Sequence[float]) -> Result:
    """Return mean, 95 % interval and n of a figure that was measured once per seed.

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
    """Return mean, interval, n and the two-sided p of Student's paired t-test.

    p is None for a single pair, and if all differences are equal: their standard error is then 0.

    Parameters
    ----------
    gains : sequence of float
        Difference of each pair, positive if the federation is better; rounding errors count as 0.
    """
    gains = [without_rounding(gain) for gain in gains]
    mean, error = _mean_and_error(gains)
    found = {**estimate(gains), "mean": without_rounding(mean)}
    if not error:
        return {**found, "p": None}
    from scipy.stats import t

    return {**found, "p": 2 * float(t.sf(abs(mean) / error, len(gains) - 1))}


def counted(gains: Sequence[float]) -> Result:
    """Return `paired_test`, and the number of pairs that are better, worse and equal."""
    gains = [without_rounding(gain) for gain in gains]
    return {
        **paired_test(gains),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "equal": sum(gain == 0 for gain in gains),
    }


def without_rounding(difference: float) -> float:
    """Return a difference, or 0 if it is only a rounding error."""
    return 0.0 if abs(difference) <= ROUNDING else difference


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error: None for a single value, 0 for equal values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    if max(values) - min(values) <= ROUNDING:
        return mean, 0.0
    return mean, statistics.stdev(values) / math.sqrt(len(values))
