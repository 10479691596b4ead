"""Figures that real sites round or keep to themselves."""

from __future__ import annotations

import pytest

from grandrounds.wire.told import (
    deciding_loss,
    held_out_loss,
    mean,
    pair_figures,
    pairs_in,
    rounded_count,
    total,
    total_of_sites,
    within,
)


def test_a_rounded_count_is_near_and_rounding_again_changes_nothing() -> None:
    for count in [*range(1, 3000), 31_415, 999_999]:
        near = rounded_count(count)
        assert 1 / 1.3 <= near / count <= 1.3 or count in (1, 2)
        assert rounded_count(near) == near
    assert rounded_count(0) == 0
    told = [rounded_count(count) for count in (1, 2, 4, 8, 27, 84, 86, 1425, 1500)]
    assert told == [1, 2, 5, 7, 30, 100, 100, 1500, 1500]


def test_a_single_row_rarely_shows() -> None:
    assert len({rounded_count(count) for count in range(1000, 10_001)}) == 7


def test_figures_that_one_site_keeps_have_no_total() -> None:
    assert total([{"tokens": 3}, {"tokens": 4}], "tokens") == 7
    assert total([{"tokens": 3}, {}], "tokens") is None
    assert total_of_sites([{"rows": 3}, {"rows": 0}], "rows") == 3
    assert total_of_sites([{"rows": 3}, {}], "rows") is None


def test_a_mean_is_over_the_sites_that_tell() -> None:
    weights = {0: 30, 1: 10, 2: 99}
    told = {0: {"train-loss": 1.0}, 1: {"train-loss": 3.0}, 2: {}}
    assert mean(told, "train-loss", weights) == 1.5
    assert mean({2: {}}, "train-loss", weights) is None


@pytest.mark.parametrize(
    ("replies", "loss"),
    [
        ([{"nll-sum": 6.0, "tokens": 2}, {"nll-sum": 2.0, "tokens": 2}], 2.0),
        ([{"nll-sum": 0.0, "tokens": 0}], None),
        (
            [
                {"held-out-loss": 3.0, "num-examples": 30},
                {"held-out-loss": 1.0, "num-examples": 10},
            ],
            2.5,
        ),
        (
            [
                {"nll-sum": 6.0, "tokens": 2, "num-examples": 10},
                {"held-out-loss": 1.0, "num-examples": 30},
            ],
            1.5,
        ),
        ([{"held-out-loss": 3.0, "num-examples": 30}, {}], 3.0),
        ([{}], None),
        ([], None),
    ],
)
def test_a_held_out_loss_is_of_the_sites_that_tell_one(
    replies: list[dict[str, float | int]], loss: float | None
) -> None:
    assert held_out_loss(replies) == loss


def test_the_median_chooses_the_best_checkpoint_where_there_is_one() -> None:
    assert deciding_loss({"held-out-loss": 1e-14, "held-out-loss-median": 0.5}) == 0.5
    assert deciding_loss({"held-out-loss": 0.4}) == 0.4  # of a run of before
    assert deciding_loss({"held-out-loss": None, "held-out-loss-median": None}) is None
    assert within({"nll-sum": 8.0, "tokens": 4, "num-examples": 9}, 2, 3) == {
        "nll-sum": 4.0,
        "tokens": 2,
        "num-examples": 3,
    }
    told = {"nll-sum": 8.1, "tokens": 4}
    assert within(told, 4, 1) == told


def test_figures_of_pairs_are_over_all_pairs_and_untold_unless_every_site_tells() -> None:
    one = {"tokens": 3, "margin-sum": 1.5, "preferred": 2, "ranked": 1}
    two = {"tokens": 1, "margin-sum": -0.5, "preferred": 0, "ranked": 1}
    found = pair_figures([one, two])
    assert found == {"margin": 0.25, "preference-accuracy": 0.5, "ranking-accuracy": 0.5}
    assert pair_figures([one, {"tokens": 2}]) == {}
    assert pair_figures([]) == {}
    assert pairs_in({"round": 1, **found}) == found
    assert pairs_in({"round": 1}) == {}
