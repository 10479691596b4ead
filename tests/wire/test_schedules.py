"""Learning rates against numbers worked out by hand."""

from __future__ import annotations

import pytest

from grandrounds.wire.schedule import VisitSchedule, round_learning_rate


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


def rates_of(warmup_steps: int, decay: str, num_steps: int, peak: float = 0.3) -> list[float]:
    schedule = VisitSchedule(peak, warmup_steps, decay)
    return [schedule.rate(step, num_steps) for step in range(num_steps)]


def test_warm_up_rises_by_equal_parts_to_the_peak() -> None:
    """Two warm-up steps: 1/3, 2/3, then 1."""
    rates = rates_of(2, "constant_with_warmup", 5)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3], rel=1e-15)


def test_without_warm_up_every_step_has_the_peak() -> None:
    assert rates_of(0, "constant", 3) == [0.3, 0.3, 0.3]


def test_no_step_is_idle() -> None:
    assert rates_of(5, "constant_with_warmup", 6, 0.6)[0] == pytest.approx(0.1)
    assert all(rate > 0 for decay in ("linear", "cosine") for rate in rates_of(2, decay, 6))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_falling_schedule_is_hugging_faces(decay: str) -> None:
    """After the warm-up, whose first step is 0 there."""
    import torch
    import transformers

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = transformers.get_scheduler(decay, optimizer, num_warmup_steps=2, num_training_steps=7)
    expected = []
    for _ in range(7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates_of(2, decay, 7)[2:] == pytest.approx(expected[2:], rel=1e-12)
