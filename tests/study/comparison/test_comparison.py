"""Arms, visits, statistics and results of a comparison, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.errors import ConfigError
from grandrounds.statistics import counted, estimate, paired_test
from grandrounds.study.comparison.budget import local_examples, local_visits, pooled_visits
from grandrounds.study.comparison.results import results, share
from grandrounds.study.comparison.tables import notes, tables
from grandrounds.study.comparison.units import (
    ARMS,
    Design,
    Unit,
    check_arms,
    check_leave_one_out,
    check_private,
    check_seeds,
    check_sites,
)
from grandrounds.study.sites import names_of_sites
from grandrounds.wire.schedule import cohort_of

# --- What is asked for ----------------------------------------------------------------------------


def test_arms_come_in_their_own_order_and_once() -> None:
    assert check_arms(["local", "federated", "local"]) == ("federated", "local")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["centralized"], "Did you mean 'centralised'?"),
        (["base"], "It is always evaluated."),
        ([], "--arms is empty"),
    ],
)
def test_an_unknown_arm_is_told_with_the_nearest(names: list[str], told: str) -> None:
    with pytest.raises(
        ConfigError, match="allowed: federated, personal, private, centralised, local"
    ) as error:
        check_arms(names)
    assert told in str(error.value)


def test_seeds_count_from_the_first_and_are_at_least_one() -> None:
    assert check_seeds(42, 3) == [42, 43, 44]
    with pytest.raises(ConfigError, match="--seeds = 0: at least 1 seed"):
        check_seeds(42, 0)


def test_sites_are_all_or_numbers() -> None:
    assert check_sites("all", 3) == [0, 1, 2]
    assert check_sites("2, 0,2", 3) == [0, 2]
    for text in ("3", "-1", "one", "", "1,x"):
        with pytest.raises(ConfigError, match="numbers from 0 to 2"):
            check_sites(text, 3)


def test_sites_may_be_given_by_name(flashcards: Path) -> None:
    config = recipes.resolve(
        {
            "static.dataset.name": str(flashcards),
            "data.partitioner": "natural",
            "data.partition-by": "ward",
            "data.num-partitions": 4,
        }
    )
    called = names_of_sites(config)
    assert dict(called.labels) == {site: f"ward {site}" for site in range(4)}
    assert check_sites("Ward 3, 0", 4, called) == [0, 3]
    with pytest.raises(ConfigError, match=r"ward 9 is not a site.*or names: ward 0, ward 1"):
        check_sites("ward 9", 4, called)


def test_leaving_one_out_needs_two_sites() -> None:
    one = {"data.num-partitions": 1, "strategy.fraction-train": 1, "strategy.fraction-evaluate": 1}
    with pytest.raises(ConfigError, match="at least 2 sites"):
        check_leave_one_out(recipes.resolve(one))


def test_units_are_seed_by_seed_and_only_some_arms_have_sites() -> None:
    names = [unit.name for unit in Design(ARMS, [1, 2], [1]).units(2)]
    assert names[:9] == [
        "base/seed-1",
        "federated/seed-1",
        "personal/seed-1/site-0",
        "personal/seed-1/site-1",
        "private/seed-1",
        "centralised/seed-1",
        "local/seed-1/site-0",
        "local/seed-1/site-1",
        "leave-one-out/seed-1/site-1",
    ]
    assert len(names) == 18


def test_a_private_recipe_is_the_arm_private_and_no_other_recipe_is() -> None:
    plain = recipes.resolve()
    private = recipes.resolve({"privacy.unit-guarantee": "example", "privacy.target-epsilon": 4.0})
    check_private(("federated", "local", "leave-one-out"), plain)
    check_private(("federated", "private", "local"), private)
    for arms, config, said in (
        (("federated", "private"), plain, "needs a recipe with a guarantee"),
        (("federated",), private, "its arm is 'private'"),
        (("private", "leave-one-out"), private, "Leave it out"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_private(arms, config)


IID = {"data.partitioner": "iid", "data.partition-by": "", "data.num-partitions": 20}

BATCH = ("per-device-train-batch-size", "gradient-accumulation-steps")

# --- Visits ---------------------------------------------------------------------------------------


def test_a_site_alone_makes_the_visits_that_it_has_in_the_mean() -> None:
    """24 rounds x 4 of 20 sites x 5 steps = 24 steps: four visits of 5 steps, one of 4.

    They stand at rounds ceil((v - 1/2) 24 / 5) = ceil(2.4, 7.2, 12, 16.8, 21.6).
    """
    config = recipes.resolve(IID)
    total, *_ = local_examples(config, [80] * 20)
    visits = local_visits(config, total, 80)
    assert visits == [(3, 80), (8, 80), (12, 80), (17, 80), (22, 64)]


def test_a_site_that_is_always_there_visits_in_every_round() -> None:
    config = recipes.resolve({"strategy.fraction-train": 1, "num-server-rounds": 3})
    assert local_examples(config, [80] * 20) == [240] * 20
    assert local_visits(config, 240, 80) == [(1, 80), (2, 80), (3, 80)]


@pytest.mark.parametrize(
    ("rounds", "shares"),
    [
        # 1 round x 4 sites x 80 examples = 320 = 20 x 16: whole steps
        (1, [16] * 20),
        # 3 rounds: 960 = 20 x 48
        (3, [48] * 20),
    ],
)
def test_sites_alone_visit_together_what_the_federation_visits(
    rounds: int, shares: list[int]
) -> None:
    config = recipes.resolve({**IID, "num-server-rounds": rounds})
    assert local_examples(config, [80] * 20) == shares


def test_the_last_step_of_a_site_alone_is_shorter_and_never_a_whole_step_more() -> None:
    """5 rounds x 3 of 7 sites x 2 steps of 16 = 480 = 7 x 68 + 4 examples; steps gave 7 x 64."""
    keys = {"data.num-partitions": 7, "strategy.fraction-train": 3 / 7, "num-server-rounds": 5}
    keys |= {"train.training-arguments.max-steps": 2, "strategy.fraction-evaluate": 1.0}
    config = recipes.resolve({**IID, **keys})
    shares = local_examples(config, [32] * 7)
    assert sorted(shares) == [68] * 3 + [69] * 4
    assert sum(count for _, count in pooled_visits(config, [32] * 7)) == sum(shares) == 480
    assert [count for _, count in local_visits(config, 69, 32)] == [32, 32, 5]


def test_visits_counted_in_epochs_are_shared_by_the_sizes_of_the_sites() -> None:
    """As many as the drawn cohorts see, to the example, whoever was drawn."""
    arguments = {"train.training-arguments.max-steps": -1, "num-server-rounds": 2}
    config = recipes.resolve({**IID, **arguments})
    each = list(range(40, 60))
    shares = local_examples(config, each)
    drawn = sum(each[k] for number in (1, 2) for k in cohort_of(config, number))
    assert sum(shares) == drawn
    expected = [drawn * one / sum(each) for one in each]
    assert all(abs(got - one) < 1 for got, one in zip(shares, expected, strict=True))


def test_a_site_alone_visits_at_least_one_example() -> None:
    keys = {"strategy.fraction-train": 0.05, "num-server-rounds": 1}
    one = {"train.training-arguments.max-steps": 1}
    one |= {f"train.training-arguments.{k}": 1 for k in BATCH}
    config = recipes.resolve({**IID, **keys, **one})
    assert local_examples(config, [1] * 20) == [1] * 20


# --- Statistics -----------------------------------------------------------------------------------


def test_estimate_is_students_interval() -> None:
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, so ± 4.302653 / sqrt(3)."""
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert found["mean"] == 2
    assert found["interval"] == pytest.approx([2 - half, 2 + half])
    assert estimate([5.0]) == {"mean": 5.0, "interval": None, "n": 1}


def test_paired_test_of_two_degrees_of_freedom_is_known_in_closed_form() -> None:
    """With 2 degrees of freedom p = 1 - t / sqrt(2 + t²); here t = 2 / (1 / sqrt(3)) = sqrt(12)."""
    assert paired_test([1.0, 2.0, 3.0])["p"] == pytest.approx(1 - math.sqrt(12 / 14))


def test_equal_differences_have_no_p() -> None:
    assert paired_test([0.5, 0.5]) == {"mean": 0.5, "interval": [0.5, 0.5], "n": 2, "p": None}
    assert paired_test([0.5])["p"] is None


def test_counted_says_how_many_gain() -> None:
    found = counted([1.0, 2.0, -1.0, 0.0])
    assert (found["better"], found["worse"], found["equal"]) == (2, 1, 1)


def test_differences_of_rounding_are_none() -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17: two sites are equal, and two equal differences have no error."""
    rounding = 0.1 + 0.2 - 0.3
    assert rounding > 0
    found = counted([rounding, -rounding, 0.5])
    assert (found["better"], found["worse"], found["equal"]) == (1, 0, 2)
    nothing = {"mean": 0.0, "interval": [0.0, 0.0], "n": 2, "p": None}
    assert paired_test([rounding, 0.0]) == nothing
    assert paired_test([0.3, 0.1 + 0.2])["p"] is None
    assert paired_test([0.3, rounding - 0.3])["mean"] == 0
    assert paired_test([1e-6])["mean"] == 1e-6  # one answer in a million is no rounding


# --- Results --------------------------------------------------------------------------------------

EXAMS: dict[str, dict[str, Any]] = {
    "private": {"by-site": True, "site-of": (0, 0, 1, 1), "measures": "learned"},
    "public": {"by-site": False, "site-of": None, "measures": "kept"},
}


def unit(site: int | None, nll: tuple[float, float], private: str, public: str) -> dict[str, Any]:
    """Return what a unit's file holds; site 0 is judged on 10 tokens, site 1 on 30."""
    return {
        "site": site,
        "num-sites": 2,
        "run": None,
        "held-out": {
            "0": {"nll-sum": nll[0], "tokens": 10},
            "1": {"nll-sum": nll[1], "tokens": 30},
        },
        "answers": {"private": private, "public": public},
        "example-visits": 8,
        "train-loss": 1.0,
        "seconds": 2.0,
    }


@pytest.fixture
def found() -> dict[Unit, dict[str, Any]]:
    """Two sites, two seeds: the federation knows 3 and 4 of 4 private facts, each site 1 of its 2.

    Of the other's, site 0 knows none alone, and site 1 one.
    """
    made = {}
    for seed, answers in ((1, "1110"), (2, "1111")):
        made[Unit("base", seed)] = unit(None, (30, 90), "1000", "11")
        made[Unit("federated", seed)] = unit(None, (10, 60), answers, "10")
        made[Unit("local", seed, 0)] = unit(0, (20, 120), "1000", "11")
        made[Unit("local", seed, 1)] = unit(1, (40, 45), "0110", "01")
        made[Unit("leave-one-out", seed, 1)] = unit(1, (5, 90), "1100", "11")
    return made


def test_an_arm_weighs_tokens_and_counts_questions(found: dict[Unit, Any]) -> None:
    arms = results(found, EXAMS)["arms"]
    federated = arms["federated"]["seeds"]["1"]
    assert federated["held-out-loss"] == pytest.approx(70 / 40)
    assert federated["accuracy"] == {"private": 0.75, "public": 0.5}
    assert federated["sites"]["1"]["accuracy"] == {"private": 0.5}
    assert arms["federated"]["accuracy"]["private"]["mean"] == pytest.approx(0.875)


def test_sites_alone_answer_each_for_itself(found: dict[Unit, Any]) -> None:
    local = results(found, EXAMS)["arms"]["local"]["seeds"]["1"]
    assert local["held-out-loss"] == pytest.approx(65 / 40)
    assert local["accuracy"] == {"private": 0.5, "public": 0.75}  # public: the mean of 2/2 and 1/2
    assert local["example-visits"] == 16
    assert local["sites"]["1"]["accuracy"] == {"private": 0.5}


def test_sites_alone_answer_for_everybody_too(found: dict[Unit, Any]) -> None:
    """Losses 140/40 and 85/40; 1 and 2 of 4 private facts."""
    local = results(found, EXAMS)["arms"]["local"]
    everywhere = local["seeds"]["1"]["everywhere"]
    assert everywhere["held-out-loss"] == pytest.approx((3.5 + 2.125) / 2)
    assert everywhere["accuracy"] == {"private": 0.375, "public": 0.75}
    assert local["sites"]["1"]["everywhere"]["accuracy"]["public"]["mean"] == 0.5


def test_a_seed_with_a_site_missing_is_not_yet_an_arms(found: dict[Unit, Any]) -> None:
    del found[Unit("local", 2, 1)]
    content = results(found, EXAMS)
    assert list(content["arms"]["local"]["seeds"]) == ["1"]
    assert content["gains"][-1]["over-seeds"]["n"] == 1
    assert [j["own"]["held-out-loss"]["n"] for j in content["joining"]] == [2, 1, 2]
    del found[Unit("local", 1, 1)]
    assert "local" not in results(found, EXAMS)["arms"]


def test_gains_are_above_zero_where_the_federation_is_better(found: dict[Unit, Any]) -> None:
    told = results(found, EXAMS)["gains"]
    gains = {(g["over"], g["measure"]): g for g in told if g["where"] == "own"}
    assert gains["base", "held-out-loss"]["over-seeds"]["mean"] == pytest.approx(3 - 1.75)
    assert gains["local", "held-out-loss"]["over-seeds"]["mean"] == pytest.approx(-5 / 40)
    loss = gains["local", "held-out-loss"]["over-sites"]  # 2 - 1 at site 0, 1.5 - 2 at site 1
    assert (loss["mean"], loss["better"], loss["worse"]) == (pytest.approx(0.25), 1, 1)
    private = gains["local", "private"]
    assert private["over-seeds"]["mean"] == pytest.approx((0.25 + 0.5) / 2)
    assert private["over-questions"]["1"]["only-federated"] == 1
    assert private["over-questions"]["2"]["p"] == 0.5  # 2 of 2, exact and two-sided
    public = gains["local", "public"]  # each site's model is another one: no pairs of questions
    assert (public["over-sites"], public["over-questions"]) == (None, None)
    everywhere = {g["measure"]: g for g in told if g["where"] == "everywhere"}
    assert list(everywhere) == ["held-out-loss", "private"]  # 75 % and 100 % against 37.5 %
    assert everywhere["private"]["over-seeds"]["mean"] == pytest.approx(0.5)
    assert everywhere["private"]["over-sites"]["better"] == 2


def test_joining_is_told_from_both_sides(found: dict[Unit, Any]) -> None:
    joining = {(j["site"], j["instead-of"]): j for j in results(found, EXAMS)["joining"]}
    assert list(joining) == [(0, "local"), (1, "local"), (1, "leave-one-out")]
    assert joining[0, "local"]["others"] is None
    assert joining[0, "local"]["own"]["accuracy"]["private"]["mean"] == 0.5
    assert joining[0, "local"]["everywhere"]["accuracy"]["private"]["mean"] == 0.625
    left_out = joining[1, "leave-one-out"]
    assert left_out["own"]["held-out-loss"]["mean"] == pytest.approx(3 - 2)
    assert left_out["own"]["accuracy"]["private"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert left_out["others"]["held-out-loss"]["mean"] == pytest.approx(0.5 - 1)
    assert left_out["others"]["accuracy"]["private"]["mean"] == 0


def test_nothing_finished_is_no_result() -> None:
    assert results({}, EXAMS) == {"arms": {}, "without": {}, "gains": [], "joining": []}


def test_share_is_of_all_answers() -> None:
    assert share("0110") == 0.5


def test_tables_show_every_arm_and_site_with_as_many_cells_as_columns(
    found: dict[Unit, Any],
) -> None:
    content = {
        **results(found, EXAMS),
        "exams": EXAMS,
        "seeds": [1, 2],
        "sites": [
            {
                **{"site": k, "name": f"Ward {k}"},
                **{name: {"1": 9, "2": 11} for name in ("train-examples", "held-out-examples")},
            }
            for k in range(2)
        ],
        "budget": {"rounds": 2, "cohort": 1, "sites": 2, "local-visits": 1.0},
    }
    made = tables(content)
    assert [len(table.rows) for table in made] == [
        5,
        8,
        2,
        1,
    ]  # base, federated, local, its everywhere, without 1
    for table, row in itertools.chain.from_iterable(
        ((table, row) for row in table.rows) for table in made
    ):
        assert len(row) == len(table.columns)
    assert [row[0] for row in made[2].rows] == ["Ward 0", "Ward 1"]
    assert made[0].rows[-1][0] == "without Ward 1"
    assert made[0].rows[0][:3] == ("base", "3.000 ± 0.000", "25.0 ± 0.0")
    assert "forgetting: accuracy on public facts 100.0 % before training, 50.0 % after" in notes(
        content
    )
