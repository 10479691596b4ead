"""What a private recipe spends and means: visits, noise to clip, and the level of sites."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.errors import ConfigError
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.study.plan.privacy import (
    PrivacyPlan,
    gaussian_noise,
    meaning,
    plan_of_recipe,
    privacy_plan,
    verdict,
    warnings,
)
from grandrounds.wire.schedule import cohorts_of, visits_at_most

VISITS = Mechanism(1.0, 1.0, 0.064, 1000, steps=4, visits=5, delta=1e-5)


OWN_DATA = {"static.dataset.name": "own.jsonl"}


def configured(**changes: Any) -> Any:
    values = {"privacy.unit-guarantee": "example", "privacy.declared-units": 1000}
    noise = {"privacy.noise-multiplier": 1.0}
    return recipes.resolve(values, noise, {k.replace("__", "."): v for k, v in changes.items()})


def planned(noise: float = 1.0, num_values: int = 67_584, **changes: Any) -> PrivacyPlan:
    mechanism = dataclasses.replace(VISITS, noise_multiplier=noise)
    return PrivacyPlan(configured(**changes), mechanism, num_values)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_is_not_amplified(seed: int) -> None:
    """4 of 20 for 24 rounds are 96 visits, so 4 or 5 of each site; none is deducted for chance."""
    config = configured(seed=seed)
    assert (config.cohort_size, config.data.num_partitions) == (4, 20)
    for rounds in (1, 7, 12, 24):
        counts = Counter(site for cohort in cohorts_of(config)[:rounds] for site in cohort)
        assert max(counts.values()) <= visits_at_most(config, rounds)
    assert visits_at_most(config, 24) == math.ceil(24 * 4 / 20) == 5


def test_uniform_cohorts_may_ask_a_site_in_every_round() -> None:
    assert visits_at_most(configured(**{"strategy.cohorts": "uniform"}), 24) == 24


@pytest.mark.parametrize(("releases", "epsilon"), [(5, 3.61), (24, 9.92)])
def test_several_gaussian_releases_are_one_with_less_noise(releases: int, epsilon: float) -> None:
    """PLD gives ε = 3.605 for five releases of multiplier 2 at delta = 1e-3, and 9.9 for 24."""
    assert math.sqrt(releases) * gaussian_noise(epsilon, 1e-3) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("noise", "learns", "said"),
    [
        # 260 = sqrt(67,584) over an expected batch of 64: a ratio of 4.06 at multiplier 1
        (1.0, "likely", []),
        (2.0, "doubtful", ["may not learn: a step's noise is 8.12 times"]),
        (5.0, "no", ["will not learn: a step's noise is 20.3 times"]),
    ],
)
def test_noise_that_drowns_the_signal_is_told(noise: float, learns: str, said: list[str]) -> None:
    plan = planned(noise)
    assert verdict(plan) == learns
    found = warnings(plan)
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_a_delta_that_lets_a_record_be_published_is_told() -> None:
    plan = planned()
    large = dataclasses.replace(plan, mechanism=dataclasses.replace(VISITS, delta=1e-3))
    assert warnings(plan) == []
    assert warnings(large)[0].startswith("delta = 0.001 is too large for 1,000 units")


@pytest.mark.parametrize(("sites", "cohort"), [(5, 5), (20, 20), (79, 79), (1000, 100)])
def test_nothing_is_called_private_at_site_level(sites: int, cohort: int) -> None:
    plan = planned(
        **{
            "data.num-partitions": sites,
            "data.partitioner": "iid",
            "strategy.fraction-train": cohort / sites,
        }
    )
    level = plan.site_level
    # multiplier 2.0 for 24 releases at about ε = 10 (above), a little more at 8
    assert level.fewest_sites >= 80
    assert level.noise_to_clip == pytest.approx(level.noise_multiplier * 259.97 / cohort, rel=1e-3)
    assert ("nothing learns below about" in level.reason) == (cohort < level.fewest_sites)
    assert ("what is hidden is a unit, not a site" in level.reason) == (cohort >= 100)


def test_what_a_guarantee_means_is_said_in_probabilities() -> None:
    """ε = ln 3: right in 3 of 4 cases, 3 % detected at 1 % false alarms; ε = 8: 1 - 0.99 / e^8."""
    assert "at most 75.0 % of cases" in meaning("record", math.log(3), 0.0)
    assert "at most 3.0 % of those who did at 1 %" in meaning("patient", math.log(3), 0.0)
    assert "at most 99.97 % of those who did" in meaning("patient", 8.0, 0.0)
    assert "at most 100 % of cases" in meaning("patient", 30.0, 0.0)
    assert "for one patient" in meaning("patient", 800.0, 0.0)


def test_only_the_factor_that_is_trained_is_noised() -> None:
    """Rank 8 on the embedded base's modules: outputs x 8 for B alone, which ffa trains."""
    ffa = configured(**{"strategy.name": "ffa"})
    fedavg = configured(**{"strategy.name": "fedavg"})
    both, one = plan_of_recipe(fedavg), plan_of_recipe(ffa)
    assert (both.num_values, one.num_values) == (122_880, 67_584)
    assert one.noise_to_clip == pytest.approx(both.noise_to_clip * math.sqrt(67_584 / 122_880))


def test_the_unit_is_the_patient_where_a_column_names_one() -> None:
    assert planned().unit == "record"
    assert planned(**{"privacy.unit-column": "who"}).unit == "patient"


def test_a_recipe_that_leaves_the_units_to_the_sites_is_not_planned() -> None:
    left = configured(**{"privacy.declared-units": 0, "data.partitioner": "iid"}, **OWN_DATA)
    assert privacy_plan(left, {}) is None
    with pytest.raises(ConfigError, match="--units"):
        plan_of_recipe(left)
