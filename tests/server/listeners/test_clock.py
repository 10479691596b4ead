"""The time that is left of a run: from the steps of its first round, then from its rounds."""

from __future__ import annotations

import pytest

from grandrounds.server.listeners.clock import Clock, time_text


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_first_round_is_extrapolated_once_a_tenth_of_it_is_done() -> None:
    time = Time()
    clock = Clock(4, time)
    clock.begins(0)
    time.seconds += 1
    clock.within(0.05)
    assert clock.left is None
    time.seconds += 1
    clock.within(0.2)  # 2 s for a fifth: 10 s a round, 38 s to go
    assert clock.left == pytest.approx(38)
    time.seconds += 3
    assert clock.left == pytest.approx(35)  # it goes down between two steps
    assert clock.done == pytest.approx(0.2)


def test_later_rounds_are_as_long_as_the_mean_of_those_before() -> None:
    time = Time()
    clock = Clock(4, time)
    clock.finished(1, 10.0)
    clock.finished(2, 20.0)
    assert clock.left == pytest.approx(30)  # two rounds of 15 s
    clock.within(0.5)
    assert clock.done == pytest.approx(2.5)
    clock.finished(3, 15.0)
    clock.finished(4, 15.0)
    assert clock.left is None  # the closing exam is no round


def test_a_resumed_run_counts_from_its_round() -> None:
    time = Time()
    clock = Clock(10, time)
    clock.begins(8)
    time.seconds += 5
    clock.within(0.5)
    assert clock.left == pytest.approx(15)  # a round and a half of 10 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
