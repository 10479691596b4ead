"""FedExP's step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.server.aggregation.fedexp import Extrapolation
from grandrounds.wire.adapter import Adapter

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
    """p = 3/4, 1/4: sum p |d|^2 = 3/4 * 16 + 1/4 * 16 = 16; D = (3, 1), |D|^2 = 10; eta = 0.8 < 1.
    With -4 instead of the other axis D = 2, |D|^2 = 4: eta = 16 / 8 = 2, and the step is 4."""
    assert step([(adapter_of(4, 0, 0, 0), 3), (adapter_of(0, 4, 0, 0), 1)])[1] == 1
    result, rate = step([(adapter_of(4, 0, 0, 0), 3), (adapter_of(-4, 0, 0, 0), 1)])
    assert rate == 2
    assert result[NAME].tolist() == [[5, 1, 1, 1]]


def test_changes_that_cancel_move_nothing() -> None:
    result, rate = step([(adapter_of(4, 0, 0, 0), 1), (adapter_of(-4, 0, 0, 0), 1)])
    assert rate == 1
    assert result[NAME].tolist() == [[1, 1, 1, 1]]


def test_an_update_that_nearly_cancels_the_others_makes_a_step_longer_than_any_update() -> None:
    """Norms 1 and 3/4: sum p |d|^2 = 25/32, D = 1/8, eta = (25/32) / (2/64) = 25, step 25/8."""
    result, rate = step([(adapter_of(1, 0, 0, 0), 1), (adapter_of(-0.75, 0, 0, 0), 1)])
    assert rate == 25
    assert result[NAME].tolist() == [[4.125, 1, 1, 1]]


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
