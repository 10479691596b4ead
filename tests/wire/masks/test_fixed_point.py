"""Fixed-point numbers: by hand, at their limits, and their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from grandrounds.config import recipes
from grandrounds.errors import ReplyError
from grandrounds.wire.masks.fixed_point import (
    BITS,
    SURE_STEPS,
    FixedPoint,
    largest_change,
    numbers_of,
)

CODECS = tuple(BITS)


def summed(numbers: FixedPoint, *vectors: np.ndarray) -> np.ndarray:
    return sum(vectors, np.zeros(numbers.length, dtype=numbers.dtype))


def test_numbers_worked_out_by_hand() -> None:
    """Three sites within ±1, 16 bits: at most 32767 // 3 = 10922 each, so 13 fraction bits.

    Weights 2 of 4 and 4 of 4: 0.5 · 2/4 · 8192 = 2048, and -1 · 4/4 · 8192 = -8192. Their mean is
    (2 · 0.5 - 4 · 1) / 6 = -0.5. A count has 16 - 2 = 14 bits a number, so three numbers.
    """
    numbers = FixedPoint("masked16", 3, 1, 1.0, 4)
    assert (numbers.most, numbers.fraction_bits) == (10922, 13)
    assert (numbers.limb_bits, numbers.limbs, numbers.length) == (14, 3, 7)
    first = numbers.encode(np.array([0.5], np.float32), 2)
    second = numbers.encode(np.array([-1.5], np.float32), 4)
    assert first.tolist() == [2048, 2, 0, 0, 0, 0, 0]
    assert second.tolist() == [2**16 - 8192, 4, 0, 0, 1, 0, 0]
    found = numbers.decode(first + second)
    assert (found.mean.tolist(), found.weight, found.clipped) == ([-0.5], 6, 1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sites", [3, 4, 5, 20, 100, 255, 256])
@pytest.mark.parametrize("largest", [0.96, 1.0, 1.7, 3e-5, 1e4])
def test_no_overflow_at_most_sites(codec: str, sites: int, largest: float) -> None:
    numbers = FixedPoint(codec, sites, 2, largest, 2**32 - 1)
    at_most = np.array([largest, -largest], np.float64).astype(np.float32)
    vector = numbers.encode(np.nextafter(at_most, at_most * 4), 2**32 - 1)  # cut to the range
    found = numbers.decode(summed(numbers, *[vector] * sites))
    assert found.mean == pytest.approx([largest, -largest], abs=2.0**-numbers.fraction_bits)
    assert (found.weight, found.clipped) == (sites * (2**32 - 1), sites * 2)
    assert largest * 2.0 ** (numbers.fraction_bits + 1) > numbers.most  # no bit is given away


@pytest.mark.parametrize("sites", [3, 20])
def test_the_mean_of_32_bits_is_that_of_float32(sites: int) -> None:
    generator = np.random.default_rng(sites)
    numbers = FixedPoint("masked32", sites, 1000, largest_change(3e-3, 4), 250)
    changes = generator.normal(0, 3e-3, (sites, 1000)).astype(np.float32)
    weights = generator.integers(50, 250, sites)
    pairs = zip(changes, weights, strict=True)
    found = numbers.decode(summed(numbers, *[numbers.encode(c, int(w)) for c, w in pairs]))
    exact = np.average(changes.astype(np.float64), axis=0, weights=weights)
    assert np.abs(found.mean - exact).max() < 1e-8
    assert (found.weight, found.clipped) == (weights.sum(), 0)


def test_16_bits_round_without_bias() -> None:
    numbers = FixedPoint("masked16", 20, 40_000, 1.0, 1)
    unit = 2.0**-numbers.fraction_bits
    change = np.full(40_000, 0.3 * unit, np.float32)
    drawn = numbers.encode(change, 1)[:40_000]
    assert set(drawn.tolist()) == {0, 1}
    assert abs(drawn.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)
    assert (numbers.encode(change, 1)[:40_000] != drawn).any()  # the operating system's coins


@pytest.mark.parametrize("codec", CODECS)
def test_squared_lengths_and_shares_travel_where_a_rule_needs_them(codec: str) -> None:
    """Weights 1 and 3, changes (0.3, 0.4) and (0, 0.5): each of squared length 0.25."""
    numbers = FixedPoint(codec, 20, 2, 1.0, 5, has_squares=True)
    pairs = (([0.3, 0.4], 1), ([0.0, 0.5], 3))
    vectors = [numbers.encode(np.array(change, np.float32), weight) for change, weight in pairs]
    found = numbers.decode(summed(numbers, *vectors))
    assert found.square == pytest.approx(0.25, abs=1e-7)
    assert found.squared_shares == pytest.approx((1 + 9) / 16, abs=1e-7)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sites", [3, 100, 256])
def test_squares_do_not_overflow_at_most_sites(codec: str, sites: int) -> None:
    numbers = FixedPoint(codec, sites, 2, 0.37, 10, has_squares=True)
    vector = numbers.encode(np.array([0.37, -0.37], np.float32), 10)
    found = numbers.decode(summed(numbers, *[vector] * sites))
    assert found.square == pytest.approx(2 * 0.37**2, rel=1e-6)
    assert found.squared_shares == pytest.approx(1 / sites, rel=1e-6)


def test_a_weight_above_the_largest_one_counts_as_that() -> None:
    numbers = FixedPoint("masked32", 3, 1, 1.0, 10)
    change = np.array([0.25], np.float32)
    assert (numbers.encode(change, 99) == numbers.encode(change, 10)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    numbers = FixedPoint("masked32", 3, 2, 1.0, 10)
    with pytest.raises(ReplyError, match="not finite"):
        numbers.encode(np.array([0, value], np.float32), 1)


def test_weights_of_nothing_are_refused() -> None:
    numbers = FixedPoint("masked32", 3, 2, 1.0, 10)
    with pytest.raises(ReplyError, match="add up to 0"):
        numbers.decode(np.zeros(numbers.length, numbers.dtype))


BETA1, BETA2 = 0.9, 0.999


def bound_of_step(t: int) -> float:
    """Return r(t), the most learning rates that step t of a fresh Adam moves a value by.

    Adam moves it by m̂ / √v̂, m̂ = Σ (1 - b1) b1^k g_k / (1 - b1^t) and v̂ likewise of squares. By
    Cauchy and Schwarz, Σ b1^k g_k = Σ (b1 / √b2)^k (√b2^k g_k) ≤ √(Σ q^k) √(Σ b2^k g_k²).
    """
    q = BETA1**2 / BETA2
    of_moments = (1 - BETA1) / math.sqrt(1 - BETA2) * math.sqrt((1 - q**t) / (1 - q))
    return of_moments * math.sqrt(1 - BETA2**t) / (1 - BETA1**t)


def steps_of_adam(gradients: Iterable[float]) -> list[float]:
    """Return how far Adam moves a value in each step, in learning rates."""
    first = second = 0.0
    moved = []
    for step, gradient in enumerate(gradients, 1):
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        unbiased = first / (1 - BETA1**step), second / (1 - BETA2**step)
        moved.append(unbiased[0] / math.sqrt(unbiased[1]))
    return moved


def test_adam_stays_within_the_range_that_is_known_before() -> None:
    """Up to `SURE_STEPS` steps whatever the gradients: those that grow by b2 / b1 a step are worst.

    Their last step is r(t) exactly, above the 3.16 of one gradient after none.
    """
    bounds = [bound_of_step(t) for t in range(1, SURE_STEPS + 2)]
    assert sum(bounds[:-1]) <= largest_change(1.0, SURE_STEPS)
    assert sum(bounds) > largest_change(1.0, SURE_STEPS + 1)
    worst = steps_of_adam((BETA2 / BETA1) ** t for t in range(SURE_STEPS))
    assert worst[-1] == pytest.approx(bounds[SURE_STEPS - 1])
    assert worst[-1] > 5 > 3.17
    sparse = steps_of_adam([1e-12] * (SURE_STEPS - 1) + [1.0])
    for moved in (worst, sparse):
        assert all(a <= b * (1 + 1e-9) for a, b in zip(moved, bounds, strict=False))
        assert sum(moved) <= largest_change(1.0, SURE_STEPS)


@pytest.mark.parametrize("changes", [{"sites": 0}, {"largest_value": 0.0}, {"most_weight": 2**32}])
def test_impossible_numbers_are_refused(changes: dict[str, float]) -> None:
    given = {"sites": 3, "values": 1, "largest_value": 1.0, "most_weight": 1, **changes}
    with pytest.raises(ValueError, match="no fixed-point numbers"):
        FixedPoint("masked32", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", BITS)
def test_a_round_with_a_learning_rate_of_0_is_a_sum_of_nothing(codec: str) -> None:
    config = recipes.resolve({"secure-aggregation": codec, "train.learning-rate-min": 0.0})
    numbers = numbers_of(config, 0.0, 4, 10, 7)
    found = numbers.decode(4 * numbers.encode(np.zeros(10, np.float32), 7))
    assert (found.weight, found.clipped, found.mean.any()) == (28, 0, np.False_)
