"""Confidence intervals of accuracies."""

from __future__ import annotations

import math

import pytest

from grandrounds.evaluation.statistics import wilson_interval


def test_wilson_interval_of_eight_in_ten_agrees_with_the_formula() -> None:
    """Worked out by hand from Wilson's formula, z = 1.959964.

    Centre (p + z²/2n) / (1 + z²/n) = (0.8 + 3.841459/20) / 1.3841459 = 0.716740; half width
    z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n) = 1.959964 sqrt(0.016 + 0.009603647) / 1.3841459
    = 0.226577.
    """
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.716740 - 0.226577, abs=1e-5)
    assert high == pytest.approx(0.716740 + 0.226577, abs=1e-5)


def test_wilson_interval_of_none_right_starts_at_zero() -> None:
    """With p = 0 the upper bound is (z²/n) / (1 + z²/n) = z² / (n + z²)."""
    z_squared = 1.959963984540054**2
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert high == pytest.approx(z_squared / (20 + z_squared))


def test_more_confidence_widens_the_interval() -> None:
    low_95, high_95 = wilson_interval(30, 40)
    low_99, high_99 = wilson_interval(30, 40, confidence=0.99)
    assert low_99 < low_95 < 0.75 < high_95 < high_99


@pytest.mark.parametrize(
    ("correct", "n", "confidence"),
    [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0), (1, 5, math.nan)],
)
def test_impossible_counts_are_refused(correct: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"no interval|confidence"):
        wilson_interval(correct, n, confidence)
