"""AUC, hits at few false alarms, exposure and ranks, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grandrounds.study.audit.extraction import exposure, extraction, rank_of
from grandrounds.study.audit.membership import (
    auc,
    auc_interval,
    auc_of_gaussian,
    clopper_pearson,
    hits,
    membership,
)


def test_auc_counts_pairs_and_half_of_ties() -> None:
    """Of 3 x 2 pairs, 3 and 2 win both; 1 beats 0 and ties with 1: 5.5 of 6."""
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(5.5 / 6)
    assert auc(np.zeros(4), np.zeros(7)) == 0.5


def test_the_interval_of_an_auc_has_a_width_at_the_end_too() -> None:
    """At 0.5 with n each: V = (1 + 2 (n - 1) / 3) / (4 n n), and solved at the bound's own V."""
    low, high = auc_interval(0.5, 100, 100)
    assert low == pytest.approx(1 - high, abs=1e-9)
    assert 0.5 - low == pytest.approx(1.96 * math.sqrt((1 + 66) / 40_000), abs=0.002)
    low, high = auc_interval(1.0, 100, 100)
    assert high == 1.0
    assert 0.96 < low < 1.0


def test_hits_at_false_alarms_use_the_thresholds_of_the_others() -> None:
    """Of 100 others one may be above; two members are above the second highest of them."""
    others = np.arange(100.0)
    found = hits(np.array([98.5, 99.5, 97.0, 0.0]), others, 0.01)
    assert (found.found, found.members) == (2, 4)
    assert hits(np.array([98.5, 99.5]), others, 0.001).found == 1  # none may be above


def test_clopper_and_pearson_at_nothing_found() -> None:
    """(1 - p)^10 = 0.025 at the upper bound of 0 of 10."""
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        membership(np.array([1.0, math.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="0 others"):
        membership(np.array([1.0]), np.array([True]))


@pytest.mark.parametrize(("epsilon", "allowed"), [(0.85, 0.565), (3.28, 0.709), (6.65, 0.844)])
def test_a_guarantee_allows_an_auc(epsilon: float, allowed: float) -> None:
    """Phi(1 / (z sqrt 2)) with the noise multiplier z: 4.33 at ε = 0.85 and delta = 1e-5."""
    assert auc_of_gaussian(epsilon, 1e-5) == pytest.approx(allowed, abs=5e-4)


def test_exposure_has_exact_ranks() -> None:
    """The second of 8 values: log2 8 - log2 2 = 2 bits; ties count against the attack."""
    assert rank_of([-1.0, -3.0, -2.0], true=2) == 2
    assert rank_of([-1.0, -1.0], true=0) == 2
    assert exposure(2, 8) == 2.0
    found = extraction([True, False, True], [1, 4, 2], 8, [True, True, False])
    assert (found.matches, found.number, found.first) == (1, 2, 1)
    assert found.mean_exposure == pytest.approx((3 + 1) / 2)
