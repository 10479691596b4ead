"""Learning rates against numbers worked out by hand."""

from __future__ import annotations

import pytest

from grandrounds.wire.schedule import round_learning_rate, step_learning_rate


@pytest.mark.parametrize(
    ("number", "expected"), [(1, 0.8535533905932737), (2, 0.5), (3, 0.14644660940672627), (4, 0.0)]
)
def test_rounds_follow_half_a_cosine(number: int, expected: float) -> None:
    """(1 + cos(pi/4)) / 2 = (1 + sqrt(2)/2) / 2 = 0.85355, and so on by the unit circle."""
    assert round_learning_rate(number, 4, 1.0, 0.0) == pytest.approx(expected, abs=1e-15)


def test_the_last_round_has_exactly_the_minimum() -> None:
    for rounds in (1, 3, 7, 10, 200):
        assert round_learning_rate(rounds, rounds, 5e-5, 1e-6) == 1e-6


def test_flowertunes_first_rounds_are_reproduced() -> None:
    """Of 200 rounds from 5e-5 to 1e-6: cos(pi/200) = 0.99987663, so round 1 has
    1e-6 + 4.9e-5 * 1.99987663 / 2 = 4.99969774e-5; round 100 has the middle, 2.55e-5."""
    assert round_learning_rate(1, 200, 5e-5, 1e-6) == pytest.approx(4.99969774e-5, rel=1e-8)
    assert round_learning_rate(100, 200, 5e-5, 1e-6) == pytest.approx(2.55e-5, rel=1e-12)


def test_rates_fall_from_round_to_round() -> None:
    rates = [round_learning_rate(r, 40, 5e-3, 5e-4) for r in range(1, 41)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 40


def test_warm_up_rises_by_equal_parts_to_the_peak() -> None:
    """Two warm-up steps: 1/3, 2/3, then 1."""
    rates = [step_learning_rate(step, 2, 0.3) for step in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3], rel=1e-15)


def test_without_warm_up_every_step_has_the_peak() -> None:
    assert [step_learning_rate(step, 0, 0.3) for step in range(3)] == [0.3, 0.3, 0.3]


def test_no_step_is_idle() -> None:
    assert step_learning_rate(0, 5, 0.6) == pytest.approx(0.1)
