"""The one-run bound: theorem 5.2 by hand, and criterion mechanisms that are right and wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from grandrounds.site.private.coins import KeyedCoins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.study.audit import mechanism
from grandrounds.study.audit.mechanism import of_the_product, simulated
from grandrounds.study.audit.one_run import (
    lower_bound,
    most_that_shows,
    one_run_bound,
    p_value,
)
from grandrounds.study.plan.privacy import gaussian_noise

CANARIES = 5000
DELTA = 1e-5


def bound_of(seed: int, *, length: float = 1.0, claimed: float = 1.0) -> float:
    """Return the bound of one audit of a Gaussian sum with (claimed, 1e-5)."""
    is_in = np.random.default_rng([seed, 1]).random(CANARIES) < 0.5
    noise = gaussian_noise(claimed, DELTA)
    return one_run_bound(simulated(is_in, noise, length, seed), is_in, DELTA).epsilon


def test_two_right_guesses_of_two_by_hand() -> None:
    """ε = ln 3 guesses right with probability 3/4: both with 9/16, exactly one with 6/16.

    With delta = 0.1 and m = 2: 9/16 + 2 * 2 * 0.1 * max(6/16, (6/16 + 1/16) / 2) = 0.7125.
    """
    assert p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(1 / 4)
    assert p_value(2, 2, 2, math.log(3), 0.0) == pytest.approx(9 / 16)
    assert p_value(2, 2, 2, math.log(3), 0.1) == pytest.approx(0.7125)


def test_no_guess_shows_nothing_and_all_right_guesses_show_the_most() -> None:
    """All of r right: q^r = 0.05 at the bound, so that e^ε / (1 + e^ε) = 0.05^(1/r)."""
    assert lower_bound(100, 0, 0, 0.0) == 0.0
    assert lower_bound(100, 100, 50, 0.0) == 0.0
    right = 0.05 ** (1 / 100)
    assert lower_bound(100, 100, 100, 0.0) == pytest.approx(math.log(right / (1 - right)), abs=2e-4)
    assert 3.6 < most_that_shows(200, DELTA) < 3.8


@pytest.mark.parametrize("seed", range(3))
def test_a_right_mechanism_is_not_accused(seed: int) -> None:
    assert 0.0 < bound_of(seed) <= 1.0


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_clip_is_caught(seed: int) -> None:
    assert bound_of(seed, length=4.0) >= 1.5


@pytest.mark.slow
def test_twenty_audits_of_twenty_are_right() -> None:
    assert all(bound_of(seed) <= 1.0 for seed in range(20))
    assert all(bound_of(seed, length=4.0) >= 1.5 for seed in range(20))


def test_several_looks_are_paid_for() -> None:
    """The best of six cuts, each at a sixth of 5 %, shows less than its own cut at 5 %."""
    is_in = np.random.default_rng(1).random(1000) < 0.5
    scores = simulated(is_in, 1.0, 1.0, 1)
    best = one_run_bound(scores, is_in, 0.0)
    assert best.cuts == 6
    assert 0 < best.epsilon < lower_bound(1000, best.guesses, best.correct, 0.0)


def test_coins_that_scores_do_not_know_give_no_bound() -> None:
    is_in = np.random.default_rng(2).random(1000) < 0.5
    scores = np.random.default_rng(3).random(1000)
    assert one_run_bound(scores, is_in, DELTA).epsilon < 0.5


def product_bound(coins: KeyedCoins, *, noise: float = 1.0) -> float:
    """Return the bound of the product's own clip and noise, for a claim of ε = 1."""
    is_in = coins.uniforms(CANARIES) < 0.5
    release = Mechanism(
        noise * gaussian_noise(1.0, DELTA), 2.0, 1.0, CANARIES, steps=1, visits=1, delta=DELTA
    )
    return one_run_bound(of_the_product(is_in, release, 4.0, coins), is_in, DELTA).epsilon


def test_the_products_clip_and_noise_are_not_accused() -> None:
    assert 0.0 < product_bound(KeyedCoins(bytes(32))) <= 1.0


def test_a_product_without_its_clip_or_its_noise_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert product_bound(KeyedCoins(bytes(32)), noise=0.1) >= 1.5

    def unclipped(
        sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], clipping_norm: float
    ) -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.sum(dim=0)

    monkeypatch.setattr(mechanism, "add_clipped", unclipped)
    assert product_bound(KeyedCoins(bytes(32))) >= 1.5
