"""The weighted mean against hand numbers and exact arithmetic, in any order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from grandrounds.server.aggregation.weighted_mean import CHUNK, WeightedMean

Array = NDArray[np.float32]


def average(start: Array, changes: Sequence[tuple[Array, int]]) -> Array:
    mean = WeightedMean({"x": start.shape})
    for change, weight in changes:
        mean.add({"x": change}, weight)
    return mean.result({"x": start})["x"]


def test_hand_numbers() -> None:
    """Changes 1 and 5 with 3 and 1 examples: (3 * 1 + 1 * 5) / 4 = 2; and (3 * -2 + 6) / 4 = 0."""
    start = np.array([[10.0, 7.0]], np.float32)
    first = np.array([[1.0, -2.0]], np.float32)
    second = np.array([[5.0, 6.0]], np.float32)
    result = average(start, [(first, 3), (second, 1)])
    assert result.tolist() == [[12.0, 7.0]]
    assert result.dtype == np.float32


def test_one_reply_is_taken_over_as_it_is() -> None:
    change = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert np.array_equal(average(np.zeros((3, 5), np.float32), [(change, 7)]), change)


def test_tensors_of_different_shapes_are_averaged_each_by_itself() -> None:
    """Not square, so that a transposition cannot hide: mean of k and 3k is 2k."""
    shapes = {"A": (2, 7), "B": (5, 2), "C": (1, 1)}
    one = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    mean = WeightedMean(shapes)
    mean.add(one, 1)
    mean.add({name: 3 * array for name, array in one.items()}, 1)
    result = mean.result({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert result.keys() == shapes.keys()
    for name, array in one.items():
        assert np.array_equal(result[name], 2 * array)


def test_counts_are_kept() -> None:
    mean = WeightedMean({"x": (1,)})
    mean.add({"x": np.ones(1, np.float32)}, 3)
    mean.add({"x": np.ones(1, np.float32)}, 4)
    assert (mean.count, mean.total_weight) == (2, 7)


def test_the_changes_added_are_left_as_they_were() -> None:
    change = np.ones((2, 3), np.float32)
    change.flags.writeable = False
    start = np.zeros((2, 3), np.float32)
    average(start, [(change, 3), (change, 5)])
    assert np.array_equal(change, np.ones((2, 3)))
    assert not start.any()


@pytest.mark.parametrize("weight", [0, -1, 2**29])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match="weight"):
        WeightedMean({"x": (1,)}).add({"x": np.ones(1, np.float32)}, weight)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no client update"):
        WeightedMean({"x": (1,)}).result({"x": np.ones(1, np.float32)})


def rounded_to_float32(exact: Fraction) -> np.float32:
    """Return the float32 nearest to a fraction, ties to even: the definition, by neighbours."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(s * np.inf)) for s in (-1, 1)] + [guess]
    return min(
        candidates,
        key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1),
    )


NUMBERS = st.tuples(
    st.sampled_from([-1.0, 1.0]), st.floats(1.0, 2.0, width=32), st.integers(-20, 20)
).map(lambda parts: float(np.float32(np.ldexp(parts[0] * parts[1], parts[2]))))
"""float32 numbers over 40 binary orders of magnitude: with weights of 29 bits and mantissas of 24,
sums of some 95 bits."""

REPLIES = st.lists(st.tuples(NUMBERS, st.integers(1, 2**29 - 1)), min_size=2, max_size=8)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), replies=REPLIES)
def test_the_order_of_arrival_changes_no_bit(
    data: st.DataObject, replies: list[tuple[float, int]]
) -> None:
    """All but the first are there with both signs, so that what is left is small."""
    both = replies + [(-change, weight) for change, weight in replies[1:]]
    orders = (both, data.draw(st.permutations(both)))
    results = [
        average(
            np.zeros(1, np.float32),
            [(np.array([change], np.float32), weight) for change, weight in order],
        )
        for order in orders
    ]
    assert results[0].tobytes() == results[1].tobytes()
    total = sum(weight for _, weight in both)
    exact = Fraction(replies[0][0]) * replies[0][1] / total
    assert results[0][0] == rounded_to_float32(exact)


def test_big_numbers_that_cancel_leave_the_small_one() -> None:
    """(2^60 + 1 - 2^60) / 3 = 1/3; a plain float64 sum in this order has lost the 1."""
    changes = [(np.array([x], np.float32), 1) for x in (2.0**60, 1.0, -(2.0**60))]
    assert (2.0**60 + 1.0) - 2.0**60 == 0.0
    assert average(np.zeros(1, np.float32), changes)[0] == np.float32(1 / 3)


def test_the_mean_is_exact_arithmetic_rounded_once_to_float32() -> None:
    rng = np.random.default_rng(11)
    shape, sites = (5, 37), 9
    start = rng.normal(size=shape).astype(np.float32)
    changes = [(rng.normal(size=shape) * 1e-2).astype(np.float32) for _ in range(sites)]
    weights = [int(w) for w in rng.integers(1, 2000, sites)]
    result = average(start, list(zip(changes, weights, strict=True)))
    for place in np.ndindex(*shape):
        terms = (Fraction(float(c[place])) * w for c, w in zip(changes, weights, strict=True))
        exact = Fraction(float(start[place])) + sum(terms, Fraction(0)) / sum(weights)
        assert result[place] == rounded_to_float32(exact)


def test_tensors_of_many_chunks_are_added_place_by_place() -> None:
    """Three replies, so that sums are written both ways; longer and shorter than a chunk."""
    rng = np.random.default_rng(5)
    shapes = {"A": (3, CHUNK), "B": (7,), "C": (2, CHUNK + 5), "D": (1, 1)}
    changes = [
        {name: rng.integers(-9, 9, shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    mean = WeightedMean(shapes)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for added, change in enumerate(changes, 1):
        mean.add(change, 2)
        result = mean.result(zeros)
        for name in shapes:
            whole = sum(one[name].astype(np.float64) for one in changes[:added]) / added
            assert np.array_equal(result[name], whole.astype(np.float32))


def test_a_tensor_of_another_shape_is_refused_before_anything_is_added() -> None:
    mean = WeightedMean({"A": (1,), "B": (2, 3)})
    mean.add({"A": np.ones(1, np.float32), "B": np.ones((2, 3), np.float32)}, 1)
    with pytest.raises(ValueError, match="B: expected shape"):
        mean.add({"A": np.ones(1, np.float32), "B": np.ones((3, 2), np.float32)}, 1)
    zeros = {"A": np.zeros(1, np.float32), "B": np.zeros((2, 3), np.float32)}
    assert mean.result(zeros)["A"] == 1
    assert mean.count == 1
