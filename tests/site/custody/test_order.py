"""The site's secret orders its examples, and its position moves forward over all runs."""

from __future__ import annotations

import stat
from collections import Counter
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest

from grandrounds.config import recipes
from grandrounds.errors import ConfigError
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import order
from grandrounds.site.custody.order import epoch_order, next_examples, secret_of
from grandrounds.site.custody.state import SiteState
from grandrounds.wire.schedule import round_learning_rate_of
from tests import asking
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings

SECRET, OTHER = bytes(32), bytes([1]) * 32


@pytest.mark.parametrize("num_examples", [1, 7, 8, 100, 1001])
def test_an_epoch_leaves_out_an_eighth_to_a_quarter(num_examples: int) -> None:
    left_out = []
    for epoch in range(50):
        indices = epoch_order(SECRET, epoch, num_examples).tolist()
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(num_examples))
        left_out.append(num_examples - len(indices))
    assert min(left_out) >= num_examples // 8
    assert max(left_out) <= 2 * (num_examples // 8)
    assert len(set(left_out)) > 1 or num_examples < 8


def test_the_order_is_another_one_for_each_secret_epoch_and_number_of_examples() -> None:
    orders = [
        epoch_order(secret, epoch, count).tolist()
        for secret in (SECRET, OTHER)
        for epoch in (0, 1)
        for count in (100, 101)
    ]
    assert epoch_order(SECRET, 0, 100).tolist() == orders[0]
    starts = {tuple(one[:20]) for one in orders}
    assert len(starts) == len(orders)


def test_visits_go_on_through_the_epochs_where_the_last_one_stopped() -> None:
    whole = [i for epoch in range(3, 6) for i in epoch_order(SECRET, epoch, 40).tolist()]
    position, indices = (3, 0), list[int]()
    for count in (5, 1, 30, 44):
        some, position = next_examples(SECRET, position, 40, count)
        assert len(some) == count
        indices += some
    assert indices == whole[:80]


def test_every_example_is_given_to_within_a_few_epochs() -> None:
    seen = {i for epoch in range(12) for i in epoch_order(SECRET, epoch, 200).tolist()}
    assert len(seen) == 200


@pytest.mark.parametrize("counts", [(32, 33), (99, 100), (200, 201)], ids=str)
def test_no_two_visits_differ_by_few_examples(counts: tuple[int, int]) -> None:
    """Of 100 examples: visits of all and of all but one, and of 200 and 201, differed by one."""
    for seed in range(100):
        secret, position, given = bytes([seed]) * 32, (seed, 0), list[Counter[int]]()
        for count in counts:
            indices, position = next_examples(secret, position, 100, count)
            given.append(Counter(indices))
        assert ((given[0] - given[1]) + (given[1] - given[0])).total() > 30


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made = secret_of(tmp_path)
    assert len(made) == 32
    assert secret_of(tmp_path) == made
    assert stat.S_IMODE((tmp_path / order.SECRET).stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [order.SECRET]
    (tmp_path / order.SECRET).write_bytes(made[:5])
    with pytest.raises(ConfigError, match=r"order\.key has 5 bytes, not 32.* Remove it"):
        secret_of(tmp_path)


def test_neither_seed_nor_cursor_of_the_server_chooses_examples(
    settings: Settings, tmp_path: Path
) -> None:
    """Two visits of 32 and 33 examples with the same seed and cursor differed in one row."""
    [site, *_] = sites_of(settings, tmp_path, policy__max_runs_per_day=9)
    asks = Asking(site, settings)
    for run, number, cursor, seed in (("ab", 1, 0, 42), ("ab", 2, 0, 42), ("cd", 1, 0, 42)):
        asks(run, number, said={"cursor": cursor}, settings={"seed": seed})
    frozen = {"train.dynamic-data-seed": False}
    asks("ef", 1, settings=frozen)
    asks("ef", 2, settings=frozen)
    secret = secret_of(site.place("state"))
    with closing(SiteState(site.place("state"))) as state:
        [epoch] = {row[0] for row in state.table.execute("select min(epoch) from requests")}
        at = state.table.execute("select epoch, place from position").fetchone()
    num_examples = len(asks.visits[0].site.train)
    expected, end = next_examples(secret, (epoch, 0), num_examples, 5 * 8)
    assert [i for visit in asks.chosen() for i in visit] == expected
    assert at == end
    assert [visit.cursor for visit in asks.visits] == [0, 8, 0, 0, 8]
    assert [visit.seen for visit in asks.visits[:2]] == [8, len(set(expected[:16]))]


def test_another_site_of_the_same_rows_takes_others(settings: Settings, tmp_path: Path) -> None:
    chosen = []
    for name in ("one", "other"):
        asks = Asking(sites_of(settings, tmp_path / name)[0], settings)
        asks()
        chosen += asks.chosen()
    assert chosen[0] != chosen[1]


def test_where_the_tables_were_lost_the_orders_of_before_do_not_come_back(
    settings: Settings, tmp_path: Path
) -> None:
    [site, *_] = sites_of(settings, tmp_path)
    asks = Asking(site, settings)
    asks()
    for file in site.place("state").glob("site.sqlite*"):
        file.unlink()
    asks()
    assert asks.chosen()[0] != asks.chosen()[1]


def test_where_a_run_counts_epochs_other_sites_may_have_taken_more_steps(
    settings: Settings, tmp_path: Path
) -> None:
    """An adapter was measured by the steps of this site alone, however many another had taken."""
    [site, *_] = sites_of(settings, tmp_path)
    epochs = {**settings, "train.training-arguments.max-steps": -1}
    rate = round_learning_rate_of(recipes.resolve(epochs), 1)
    with patch.object(custody, "check_received") as checked, patch.object(asking, "made_up"):
        Asking(site, epochs)("ab", said={"learning-rate": rate})
    [(_, own, *_)] = [call.args for call in checked.call_args_list]
    assert own.arguments.max_steps == -1
