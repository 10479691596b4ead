"""What travels in a round: the factors of each rule, at each rank, and where they lie at a site."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.config.strategies import STRATEGIES
from grandrounds.wire import adapter as adapters
from grandrounds.wire.adapter import EVERYTHING, Ranks

SHAPES = {"m.lora_A.weight": (4, 3), "m.lora_B.weight": (5, 4)}
A, B = "m.lora_A.weight", "m.lora_B.weight"

WHOLE = {A: (4, 3), B: (2, 4)}


def ranks(rule: str, rank: int = 4, max_rank: int = 16, *site_ranks: int) -> Ranks:
    return Ranks(STRATEGIES[rule], rank, max_rank, site_ranks)


def of_rank(rank: int, value: float) -> dict[str, np.ndarray]:
    return {
        A: np.full((rank, 3), value, np.float32),
        B: np.full((2, rank), 10 * value, np.float32),
    }


# --- What travels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "down", "odd", "even"),
    [
        ("fedavg", {A, B}, {A, B}, {A, B}),
        ("ffa", {B}, {B}, {B}),
        ("rolora", {A, B}, {B}, {A}),
        ("fedsvd", {A, B}, {B}, {B}),
        ("lora-fair", {A, B}, {A, B}, {A, B}),
        ("la-lora", {A, B}, {A, B}, {A, B}),
        ("product", {A, B}, {A, B}, {A, B}),
    ],
)
def test_a_rule_sends_its_factors(rule: str, down: set[str], odd: set[str], even: set[str]) -> None:
    assert set(ranks(rule).shapes_down(SHAPES, 4)) == down
    assert set(ranks(rule).shapes_up(SHAPES, 1, 4)) == odd
    assert set(ranks(rule).shapes_up(SHAPES, 2, 4)) == even


def test_la_lora_trains_b_and_a_in_turn_by_step_and_other_rules_all_that_they_send() -> None:
    assert ranks("la-lora").turns(1) == ranks("la-lora").turns(2) == ("B", "A")
    assert [ranks("rolora").turns(number) for number in (1, 2)] == [("B",), ("A",)]
    assert ranks("fedavg").turns(1) == ("AB",)


def test_a_lower_rank_has_fewer_rows_of_a_and_columns_of_b() -> None:
    assert ranks("product").shapes_up(SHAPES, 1, 2) == {A: (2, 3), B: (5, 2)}
    assert adapters.at_rank(SHAPES, 2) == {A: (2, 3), B: (5, 2)}
    assert adapters.rank_of(of_rank(2, 1.0)) == 2


def test_ranks_repeat_over_the_sites() -> None:
    mixed = ranks("product", 16, 16, 8, 4)
    assert [mixed.carried(site, 16) for site in range(4)] == [8, 4, 8, 4]
    assert ranks("product", 16).carried(3, 16) == 16
    assert ranks("flora").carried(3, 12) == 12  # the stack as it is


def test_a_site_that_pruned_trains_the_ranks_that_it_was_sent() -> None:
    assert ranks("hetlora", 16).trained(0) == adapters.EVERYTHING
    assert ranks("hetlora", 16).trained(0, 12) == slice(0, 12)
    assert ranks("hetlora", 16, 16, 8, 4).trained(1, 3) == slice(0, 3)
    assert ranks("hetlora", 16, 16, 8, 4).trained(1, 16) == slice(0, 4)
    assert [adapters.kept_ranks(rank, 0.9) for rank in (16, 2, 1)] == [14, 1, 1]


def test_a_stack_grows_by_the_cohort_up_to_its_bound() -> None:
    """Rank 4, two sites a round: the untrained adapter of rank 4, then 8, 16, cut at 20."""
    stacked = [ranks("flora", 4, 20).begun_with(number, 2) for number in range(1, 6)]
    assert stacked == [4, 8, 16, 20, 20]
    assert ranks("fedavg", 4, 20).begun_with(5, 2) == 4


def test_only_a_stack_is_sent_above_the_configured_rank() -> None:
    assert ranks("flora", 4, 20).highest_sent == 20
    assert ranks("product", 4, 20).highest_sent == 4


def test_flattened_tensors_come_back() -> None:
    adapter = {A: np.arange(12, dtype=np.float32).reshape(4, 3)}
    flat = adapters.flatten(adapter)
    assert flat.tolist() == list(range(12))
    assert np.array_equal(adapters.unflatten(flat, {A: (4, 3)})[A], adapter[A])
    assert adapters.count_parameters(SHAPES) == 32


# --- Where it lies at a site ----------------------------------------------------------------------


def test_a_whole_adapter_is_placed_without_a_copy() -> None:
    whole = of_rank(4, 1.0)
    assert adapters.assemble(WHOLE, (whole, 0)) is whole


def test_a_lower_rank_is_followed_by_zeros() -> None:
    placed = adapters.assemble(WHOLE, (of_rank(1, 1.0), 0))
    assert placed[A].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert placed[B].tolist() == [[10, 0, 0, 0], [10, 0, 0, 0]]


def test_a_fresh_adapter_stands_behind_the_largest_stack() -> None:
    """Stack of rank 2, largest 3, fresh of rank 1."""
    placed = adapters.assemble(WHOLE, (of_rank(2, 1.0), 0), (of_rank(1, 7.0), 3))
    assert placed[A][:, 0].tolist() == [1, 1, 0, 7]
    assert placed[B][0].tolist() == [10, 10, 0, 70]
    assert ranks("flora", 1, 3).resident == 4
    assert ranks("flora", 1, 3).trained(0) == slice(3, 4)


def test_a_site_that_trains_under_a_stack_begins_with_the_rounds_fresh_adapter() -> None:
    stacked, shapes = ranks("flora", 1, 3), adapters.at_rank(WHOLE, 1)
    fresh = adapters.drawn_adapter(shapes, 42, 7)
    lying = stacked.on_base(of_rank(2, 1.0), shapes, 42, trains_in=7)
    assert lying[A][:2].tolist() == of_rank(2, 1.0)[A].tolist()
    assert np.array_equal(lying[A][3:], fresh[A])
    assert stacked.start_of(of_rank(2, 1.0), shapes, 42, 7) is fresh
    assert not stacked.on_base(of_rank(2, 1.0), shapes, 42, trains_in=None)[A][2:].any()


def test_a_factor_that_was_not_sent_is_the_one_drawn() -> None:
    sent = {B: of_rank(4, 5.0)[B]}
    lying = ranks("ffa").on_base(sent, WHOLE, 42, trains_in=1)
    assert np.array_equal(lying[A], adapters.drawn_adapter(WHOLE, 42)[A])
    assert (lying[B] == 50.0).all()
    assert ranks("ffa").start_of(sent, WHOLE, 42, 1) is sent


def test_only_the_trained_part_is_taken() -> None:
    change = of_rank(4, 1.0)
    change[B][:, 0] = -1
    part = adapters.trained_part(change, "B", slice(0, 2))
    assert list(part) == [B]
    assert part[B].tolist() == [[-1, 10], [-1, 10]]
    assert part[B].flags.c_contiguous
    assert ranks("product", 4, 16, 2).trained(0) == slice(0, 2)
    assert ranks("fedavg", 4, 16).trained(0) == EVERYTHING
