"""Cohorts and examples: reproducible, without repeats, independent of who runs them."""

from __future__ import annotations

import inspect
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grandrounds.wire import schedule as sampling
from grandrounds.wire.schedule import (
    adapter_generator,
    evaluation_cohort,
    examples_per_visit,
    length_grouped_batches,
    next_examples,
    training_cohort,
    visit_generator,
    visit_seed,
)


def test_a_cohort_is_sorted_without_repeats_and_of_the_right_size() -> None:
    for number in range(1, 50):
        cohort = training_cohort(1, number, 20, 6, False)
        assert cohort == sorted(set(cohort))
        assert len(cohort) == 6
        assert set(cohort) <= set(range(20))


def test_a_cohort_depends_on_seed_and_round_alone() -> None:
    assert training_cohort(1, 3, 20, 6, False) == training_cohort(1, 3, 20, 6, False)
    assert training_cohort(1, 3, 20, 6, False) != training_cohort(2, 3, 20, 6, False)
    assert len({tuple(training_cohort(1, r, 20, 6, False)) for r in range(1, 21)}) > 15


def test_no_draw_can_see_a_node_id() -> None:
    for name, function in inspect.getmembers(sampling, inspect.isfunction):
        assert not [p for p in inspect.signature(function).parameters if "node" in p], name


def test_every_site_is_drawn_about_equally_often() -> None:
    """1000 rounds of 5 of 20: 250 times each on average, standard deviation sqrt(1000 * 3/16) =
    13.7; five of them are 68."""
    counts = Counter(p for r in range(1000) for p in training_cohort(7, r, 20, 5, False))
    assert len(counts) == 20
    assert all(abs(count - 250) < 68 for count in counts.values())


@pytest.mark.parametrize(("sites", "size"), [(20, 4), (20, 3), (7, 5), (4, 4), (3, 1)])
def test_balanced_cohorts_hear_every_site_equally_often(sites: int, size: int) -> None:
    """After any round the numbers of visits differ by one at most, but for a cohort that spans two
    turns: there a site of the next turn waits where it has just had its own."""
    counts: Counter[int] = Counter(dict.fromkeys(range(sites), 0))
    for number in range(1, 4 * sites + 1):
        cohort = training_cohort(5, number, sites, size, True)
        assert len(set(cohort)) == size
        assert cohort == sorted(cohort)
        counts.update(cohort)
        assert max(counts.values()) - min(counts.values()) <= 2
    assert set(counts.values()) == {4 * size}


def test_balanced_cohorts_are_seeded_and_each_turn_has_its_own_order() -> None:
    turns = [[training_cohort(5, r, 20, 4, True) for r in range(t, t + 5)] for t in (1, 6)]
    assert turns[0] != turns[1]
    assert turns[0] != [training_cohort(6, r, 20, 4, True) for r in range(1, 6)]


def test_the_evaluation_cohort_is_drawn_apart_from_the_training_cohorts() -> None:
    assert evaluation_cohort(1, 20, 6) == evaluation_cohort(1, 20, 6)
    assert evaluation_cohort(1, 20, 6) != training_cohort(1, 0, 20, 6, False)
    assert evaluation_cohort(1, 20, 0) == []


def test_seeds_of_visits_differ_by_seed_round_and_site() -> None:
    seeds = {visit_seed(s, r, p) for s in range(5) for r in range(20) for p in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_purposes_have_independent_random_numbers() -> None:
    first = {
        int(adapter_generator(5).integers(2**62)),
        int(visit_generator(5, 0, 0).integers(2**62)),
        int(np.random.default_rng(5).integers(2**62)),
    }
    assert len(first) == 3


@pytest.mark.parametrize(("num_examples", "count"), [(27, 8), (10, 10), (100, 1), (7, 5)])
def test_no_example_repeats_before_the_epoch_is_complete(num_examples: int, count: int) -> None:
    given_so_far: list[int] = []
    for _ in range(3 * num_examples // count + 1):
        given_so_far += next_examples(3, 2, num_examples, len(given_so_far), count)
    for start in range(0, len(given_so_far), num_examples):
        epoch = given_so_far[start : start + num_examples]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == num_examples:
            assert set(epoch) == set(range(num_examples))


def test_a_visit_larger_than_the_site_gives_every_example_equally_often() -> None:
    assert Counter(next_examples(3, 0, 4, 0, 12)) == {0: 3, 1: 3, 2: 3, 3: 3}


@settings(max_examples=300, deadline=None)
@given(st.decimals("0.001", 5, places=3), st.integers(1, 100_000))
def test_an_epochs_share_is_of_the_decimal_as_written(epochs: Decimal, num_examples: int) -> None:
    """0.07 of 100 examples were 8, since 0.07 * 100 = 7.000000000000001 in binary."""
    exact = -(-int(1000 * epochs) * num_examples // 1000)
    assert examples_per_visit(-1, float(epochs), 16, num_examples) == exact
    assert examples_per_visit(-1, 0.07, 16, 100) == 7


def test_the_walk_does_not_depend_on_how_it_is_cut_into_visits() -> None:
    whole = next_examples(3, 1, 11, 0, 30)
    parts = [i for c in range(0, 30, 5) for i in next_examples(3, 1, 11, c, 5)]
    assert parts == whole


def test_epochs_sites_and_seeds_have_different_orders() -> None:
    first = next_examples(3, 1, 50, 0, 50)
    assert first != next_examples(3, 1, 50, 50, 50)
    assert first != next_examples(3, 2, 50, 0, 50)
    assert first != next_examples(4, 1, 50, 0, 50)
    assert first != sorted(first)


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=80),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_length_grouped_batches_hold_every_position_once(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = length_grouped_batches(lengths, batch_size, np.random.default_rng(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)


def test_length_grouped_batches_carry_less_padding() -> None:
    """Lengths 1 and 100 in turn, two a batch: 99 of padding per batch in order, none grouped."""
    lengths = [1, 100] * 8
    in_order = [[i, i + 1] for i in range(0, 16, 2)]
    grouped = length_grouped_batches(lengths, 2, np.random.default_rng(0))
    assert padding(lengths, in_order) == 8 * 99
    assert padding(lengths, grouped) == 0


def test_batches_come_in_a_seeded_order_and_not_by_length() -> None:
    lengths = list(range(1, 65))
    batches = length_grouped_batches(lengths, 4, np.random.default_rng(0))
    assert batches == length_grouped_batches(lengths, 4, np.random.default_rng(0))
    assert batches != length_grouped_batches(lengths, 4, np.random.default_rng(1))
    assert batches != sorted(batches)
