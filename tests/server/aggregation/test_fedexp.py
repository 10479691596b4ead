"""FedExP's step, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grandrounds.server.aggregation.fedexp import Extrapolation
from grandrounds.wire.adapter import Adapter, flatten, shapes_of, unflatten
from grandrounds.wire.masks.fixed_point import FixedPoint

NAME = "m.lora_A.weight"


def adapter_of(*values: float) -> Adapter:
    return {NAME: np.array([values], dtype=np.float32)}


def step(changes: list[tuple[Adapter, int]]) -> tuple[Adapter, float]:
    rule = Extrapolation("fedexp")
    rule.begin(1, adapter_of(1, 1, 1, 1))
    for partition, (change, weight) in enumerate(changes):
        rule.add(partition, {}, change, weight)
    return rule.result(), rule.report()["server-learning-rate"]


def test_four_changes_at_right_angles_go_twice_as_far() -> None:
    """|d_i|^2 = 4, |D|^2 = 4 * (2 / 4)^2 = 1, eta = 4 / (2 * 1) = 2: each moves by 1."""
    changes = [(adapter_of(*(2.0 * (i == j) for j in range(4))), 5) for i in range(4)]
    result, rate = step(changes)
    assert rate == 2
    assert result[NAME].tolist() == [[2, 2, 2, 2]]


def test_changes_that_agree_are_averaged() -> None:
    """|d|^2 = |D|^2: half of it is below 1, so eta is 1."""
    result, rate = step([(adapter_of(1, 0, 0, 0), 1), (adapter_of(1, 0, 0, 0), 9)])
    assert rate == 1
    assert result[NAME].tolist() == [[2, 1, 1, 1]]


def test_weights_are_those_of_the_mean() -> None:
    """Six changes, the first with weight 3/8 and length 2, the others 1/8 and 4, at right angles:
    sum p |d|^2 = 3/8 * 4 + 5/8 * 16 = 11.5, |D|^2 = 9/64 * 4 + 5/64 * 16 = 116/64."""
    lengths = [2.0, *[4.0] * 5]
    changes = [(wide(i, length), 3 if i == 0 else 1) for i, length in enumerate(lengths)]
    rule = Extrapolation("fedexp")
    rule.begin(1, wide(0, 0))
    for partition, (change, weight) in enumerate(changes):
        rule.add(partition, {}, change, weight)
    result = rule.result()[NAME][0]
    rate = 64**2 / (2 * 14 * 64)  # 1 / (2 sum p^2) = 2.29, below 11.5 / (2 * 116 / 64) = 3.17
    assert rule.report()["server-learning-rate"] == pytest.approx(rate)
    assert result == pytest.approx([rate * 0.75, *[rate * 0.5] * 5])


def wide(axis: int, length: float) -> Adapter:
    """Return six values, all zero but one."""
    return {NAME: np.eye(6, dtype=np.float32)[[axis]] * np.float32(length)}


def test_changes_that_cancel_move_nothing() -> None:
    result, rate = step([(adapter_of(4, 0, 0, 0), 1), (adapter_of(-4, 0, 0, 0), 1)])
    assert rate == 1
    assert result[NAME].tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("count", range(2, 9))
def test_updates_that_nearly_cancel_make_no_longer_step_than_updates_at_right_angles(
    count: int,
) -> None:
    """Two opposed updates had made a step of 71: norms 1 and 0.986, D = 0.007, eta = 10,000."""
    sides = [1.0 if i % 2 else -0.986 for i in range(count)]
    _, rate = step([(adapter_of(side, 0, 0, 0), 1) for side in sides])
    assert rate == max(1, count / 2)


@given(
    changes=st.lists(
        st.tuples(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), st.integers(1, 99)),
        min_size=1,
        max_size=8,
    )
)
def test_the_step_is_bounded_by_the_longest_update(
    changes: list[tuple[list[float], int]],
) -> None:
    result, rate = step([(adapter_of(*values), weight) for values, weight in changes])
    assert 1 <= rate <= max(1, len(changes) / 2)
    moved = float(np.linalg.norm(result[NAME] - 1))
    longest = max(float(np.linalg.norm(values)) for values, _ in changes)
    assert moved <= rate * longest * (1 + 1e-5) + 1e-5


def test_the_order_of_arrival_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    changes = {p: adapter_of(*rng.normal(size=4)) for p in range(9)}
    results = []
    for order in (range(9), reversed(range(9))):
        rule = Extrapolation("fedexp")
        rule.begin(1, adapter_of(1, 1, 1, 1))
        for p in order:
            rule.add(p, {}, changes[p], 7 + p)
        results.append(rule.result()[NAME].tobytes())
    assert results[0] == results[1]


def test_nothing_added_is_an_error() -> None:
    with pytest.raises(ValueError, match="no client update"):
        step([])


def test_a_masked_sum_gives_the_step_of_its_updates() -> None:
    """Four changes at right angles, of weights 1, 1, 2, 1: what the server gets is their sums."""
    changes, weights = [adapter_of(*row) for row in np.eye(4) * 0.1], [1, 1, 2, 1]
    expected, rate = step(list(zip(changes, weights, strict=True)))
    assert rate > 1
    numbers = FixedPoint("masked32", 4, 4, 0.5, 2, has_squares=True)
    pairs = zip(changes, weights, strict=True)
    found = numbers.decode(sum(numbers.encode(flatten(c), w) for c, w in pairs))
    rule = Extrapolation("fedexp")
    rule.begin(1, adapter_of(1, 1, 1, 1))
    rule.add_mean(unflatten(found.mean, shapes_of(changes[0])), found.square, found.squared_shares)
    for name, values in rule.result().items():
        assert values == pytest.approx(expected[name], abs=1e-7)
    assert rule.report()["server-learning-rate"] == pytest.approx(rate, rel=1e-6)
