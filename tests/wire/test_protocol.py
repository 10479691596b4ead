"""What travels in a round: the factors of each rule, at each rank."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.config.recipes import resolve
from grandrounds.config.strategies import STRATEGIES
from grandrounds.server.aggregation.make import make_rule, rule_settings
from grandrounds.wire import protocol

SHAPES = {"m.lora_A.weight": (4, 3), "m.lora_B.weight": (5, 4)}
A, B = "m.lora_A.weight", "m.lora_B.weight"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_rule(name: str) -> None:
    settings: dict[str, bool | int | float | str] = {"strategy.name": name}
    if name == "fedavg":
        settings["strategy.proximal-mu"] = 0.0
    if name == "fedtrimmedavg":
        settings["strategy.trimmed-share"] = 0.25
    make_rule(rule_settings(resolve(settings)))


@pytest.mark.parametrize(
    ("rule", "down", "odd", "even"),
    [
        ("fedavg", {A, B}, {A, B}, {A, B}),
        ("ffa", {B}, {B}, {B}),
        ("rolora", {A, B}, {B}, {A}),
        ("product", {A, B}, {A, B}, {A, B}),
    ],
)
def test_a_rule_sends_its_factors(rule: str, down: set[str], odd: set[str], even: set[str]) -> None:
    assert set(protocol.shapes_down(rule, SHAPES, 4)) == down
    assert set(protocol.shapes_up(rule, SHAPES, 1, 4)) == odd
    assert set(protocol.shapes_up(rule, SHAPES, 2, 4)) == even


def test_a_lower_rank_has_fewer_rows_of_a_and_columns_of_b() -> None:
    assert protocol.shapes_up("product", SHAPES, 1, 2) == {A: (2, 3), B: (5, 2)}
    assert protocol.rank_of(protocol.at_rank(SHAPES, 2)) == 2


def test_ranks_repeat_over_the_sites() -> None:
    assert [protocol.site_rank((8, 4), p, 16) for p in range(4)] == [8, 4, 8, 4]
    assert protocol.site_rank((), 3, 16) == 16


def test_a_stack_grows_by_the_cohort_up_to_its_bound() -> None:
    """Rank 4, two sites a round: the untrained adapter of rank 4, then 8, 16, cut at 20."""
    ranks = [protocol.stacked_rank(4, 20, 2, number) for number in range(1, 6)]
    assert ranks == [4, 8, 16, 20, 20]


def test_flattened_tensors_come_back() -> None:
    adapter = {n: np.arange(12, dtype=np.float32).reshape(s) for n, s in {A: (4, 3)}.items()}
    flat = protocol.flatten(adapter)
    assert flat.tolist() == list(range(12))
    assert np.array_equal(protocol.unflatten(flat, {A: (4, 3)})[A], adapter[A])
    assert protocol.count(SHAPES) == 32
