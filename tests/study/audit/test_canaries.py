"""Canaries: new names, one record each, and coins of their own; and the world around them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from grandrounds.data.formulary.facts import drugs, flashcards, public_flashcards
from grandrounds.errors import ConfigError
from grandrounds.study.audit.canaries import fresh_canaries, most_canaries, world


def test_canaries_are_new_and_in_or_out_by_fair_coins() -> None:
    canaries = fresh_canaries(600, 3, random.Random(1))
    text = " ".join(str(card["input"]) for card in (*flashcards(), *public_flashcards()))
    known = [drug.name for drug in drugs()]
    assert len({canary.question for canary in canaries}) == 600
    assert not any(name in canary.question for canary in canaries for name in known)
    assert not any(canary.question in text for canary in canaries)
    assert Counter(canary.site for canary in canaries) == {0: 200, 1: 200, 2: 200}
    is_in = sum(canary.is_in for canary in canaries)
    assert abs(is_in - 300) < 4 * (600 / 4) ** 0.5
    values = Counter(canary.true for canary in canaries)
    assert len(values) == 24
    assert max(values.values()) < 60  # 25 each on average


def test_nobody_knows_the_coins_of_the_next_audit() -> None:
    one, other = fresh_canaries(40, 1), fresh_canaries(40, 1)
    assert [c.is_in for c in one] != [c.is_in for c in other]
    assert {c.question for c in one} != {c.question for c in other}


@pytest.mark.parametrize("count", [0, 19, most_canaries() + 1])
def test_too_few_and_too_many_canaries_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="use 20 to 5,696"):
        fresh_canaries(count, 1)


def test_a_canary_that_is_in_is_one_record_of_its_site_and_one_that_is_out_is_none() -> None:
    canaries = fresh_canaries(30, 2, random.Random(2))
    rows = world(canaries, 2, 100, repeats=True)
    assert Counter(row["site"] for row in rows) == {0: 100, 1: 100}
    found = Counter((row["input"], row["output"], row["site"]) for row in rows)
    for canary in canaries:
        assert found[canary.question, canary.answer, canary.site] == canary.is_in


def test_a_large_site_repeats_the_formulary_only_where_each_record_is_a_unit() -> None:
    canaries = fresh_canaries(20, 1, random.Random(3))
    assert len(world(canaries, 1, 5000, repeats=True)) == 5000
    once = world(canaries, 1, 5000, repeats=False)
    assert len({(row["input"], row["output"]) for row in once}) == len(once)
