"""Which schedule a round follows, where a run was given another length on its way."""

from __future__ import annotations

import pytest

from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.config.schedules import lengthened, same_until, told, total_at
from grandrounds.errors import ConfigError
from grandrounds.wire.schedule import round_learning_rate, round_learning_rate_of


@pytest.mark.parametrize(
    ("earlier", "total", "played", "new", "then"),
    [
        ("", 2, 2, 4, "2/2"),
        ("", 4, 1, 6, "1/4"),
        ("", 4, 0, 6, ""),  # nothing was played
        ("2/2", 4, 3, 6, "2/2,3/4"),
        ("2/2", 4, 2, 6, "2/2"),  # no round of 4 was played
        ("2/2", 4, 1, 6, "1/2"),  # it goes back
        ("2/4", 3, 2, 4, ""),  # as if nothing had changed
    ],
)
def test_a_run_with_another_length_names_the_schedules_of_its_rounds(
    earlier: str, total: int, played: int, new: int, then: str
) -> None:
    assert lengthened(earlier, total, played, new) == then
    assert same_until((earlier, total), (then, new), played)


def test_the_rounds_that_were_played_keep_their_rates_and_the_others_follow_the_new_total() -> None:
    settings = {"num-server-rounds": 6, "earlier-schedules": "2/2,4/5"}
    config = recipes.resolve(settings)
    train = config.train
    rates = [round_learning_rate_of(config, number) for number in range(1, 7)]
    high, low = train.learning_rate_max, train.learning_rate_min
    totals = (2, 2, 5, 5, 6, 6)
    assert rates == [round_learning_rate(n, r, high, low) for n, r in enumerate(totals, 1)]
    assert rates[1] == rates[5] == low
    assert [total_at("2/2,4/5", 6, n) for n in (1, 2, 3, 4, 5, 9)] == [2, 2, 5, 5, 6, 6]
    assert told("2/2,4/5") == (
        "rounds 1 to 2 followed the schedule of 2 rounds, rounds 3 to 4 followed the schedule of 5 "
        "rounds"
    )
    assert recipe_sha256(config) != recipe_sha256(recipes.resolve({"num-server-rounds": 6}))


@pytest.mark.parametrize("value", ["2", "3/2", "2/2,1/4", "2/2,2/4", "0/2", "2/2,", "a/b", "-1/2"])
def test_what_names_no_schedules_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="last round / rounds of its schedule"):
        recipes.resolve({"earlier-schedules": value})


def test_a_recipe_whose_rounds_are_all_earlier_ones_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no round of num-server-rounds = 4"):
        recipes.resolve({"earlier-schedules": "4/4", "num-server-rounds": 4})
