"""A sample is the same for every model, and has the strata of the whole."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from grandrounds.study.evaluation.sample import stratified_sample


@given(st.lists(st.sampled_from("abc")), st.integers(0, 60))
def test_strata_keep_their_proportions_within_one_item(strata: list[str], count: int) -> None:
    chosen = stratified_sample(strata, count)
    assert len(chosen) == min(count, len(strata))
    assert chosen == sorted(set(chosen))
    assert all(0 <= i < len(strata) for i in chosen)
    found = Counter(strata[i] for i in chosen)
    for name, size in Counter(strata).items():
        assert abs(found[name] - len(chosen) * size / len(strata)) < 1


def test_the_sample_of_a_sorted_set_is_not_its_beginning() -> None:
    """10 of 8 a and 12 b: shares 4 and 6."""
    chosen = stratified_sample(["a"] * 8 + ["b"] * 12, 10)
    assert sum(i < 8 for i in chosen) == 4
    assert chosen != list(range(4)) + list(range(8, 14))
    assert chosen == stratified_sample(["a"] * 8 + ["b"] * 12, 10)
