"""ε of private visits: published and analytic values, and the noise that a target needs."""

from __future__ import annotations

import dataclasses

import pytest

from grandrounds.errors import ConfigError
from grandrounds.site.private.accountant import RENYI, calibrated, epsilon, epsilon_of
from grandrounds.site.private.mechanism import Mechanism

TEN_RELEASES = Mechanism(5.0, 1.0, 1.0, 100, steps=1, visits=10, delta=1e-5)


def test_ten_releases_compose_to_the_analytic_value() -> None:
    """Ten releases are one of multiplier 5 / sqrt(10): Balle and Wang (2018), theorem 8."""
    assert epsilon_of(TEN_RELEASES) == pytest.approx(2.594383, abs=1e-5)


def test_sampled_steps_compose_by_pld() -> None:
    """PLD's 1.8282 of dp-accounting 0.6; by Rényi's orders it is 2.1014."""
    steps = Mechanism(1.0, 1.0, 0.01, 6400, steps=10, visits=100, delta=1e-5)
    assert epsilon_of(steps) == pytest.approx(1.8282, abs=1e-3)


def test_rounds_compose() -> None:
    once, all_visits = epsilon_of(TEN_RELEASES, 1), epsilon_of(TEN_RELEASES)
    assert once < all_visits < 10 * once
    assert epsilon_of(TEN_RELEASES, 0) == 0.0


@pytest.mark.parametrize("target", [1.0, 4.0, 8.0])
def test_the_calibrated_noise_spends_the_target_and_no_more(target: float) -> None:
    noise = calibrated(target, 0.0336, 60, 1e-5)
    spent = epsilon_of(Mechanism(noise, 1.0, 0.0336, 1905, steps=60, visits=1, delta=1e-5))
    assert 0.98 * target < spent <= target


def test_what_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="No noise reaches"):
        calibrated(1e-5, 1.0, 10**6, 1e-6)


def test_epsilon_at_a_delta_below_the_tails_of_pld_is_that_of_renyi() -> None:
    by_pld, by_renyi = (epsilon(5.5, 0.016, 20, delta) for delta in (1e-14, 1e-20))
    assert by_pld < by_renyi == epsilon(5.5, 0.016, 20, 1e-20, RENYI)


def test_noise_to_clip_is_the_norm_of_the_noise_over_the_batch() -> None:
    mechanism = dataclasses.replace(TEN_RELEASES, sampling_rate=0.16)
    assert mechanism.noise_to_clip(10_000) == pytest.approx(5 * 100 / 16)
