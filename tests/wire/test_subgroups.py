"""Which subgroups of held-out examples may be told."""

from __future__ import annotations

from grandrounds.wire.subgroups import MOST, named, tellable


def test_small_subgroups_and_a_small_rest_are_not_told() -> None:
    """Of 40 examples 15 are a, 13 b, 12 missing: a rest of 12. With 10 of c and 2 missing, the rest
    of 2 would follow from the loss of all by subtraction: the smallest, c, joins it."""
    sizes = {
        name: len(places)
        for name, places in tellable({"x": ["a"] * 15 + ["b"] * 13 + [None] * 12}).items()
    }
    assert sizes == {"x = a": 15, "x = b": 13}
    hidden = tellable({"x": ["a"] * 15 + ["b"] * 13 + ["c"] * 10 + [None] * 2})
    assert list(hidden) == ["x = a", "x = b"]
    assert tellable({"x": ["a"] * 15 + ["b"] * 9}) == {}  # 9 = all - a
    assert list(tellable({"x": ["a"] * 15 + ["b"] * 9}, least=9)) == ["x = a", "x = b"]
    assert tellable({"x": ["a"] * 9}) == {}


def test_subgroups_of_two_columns_that_differ_in_a_few_examples_are_not_both_told() -> None:
    """y = c is x = a without its last 2 examples: their loss would be the difference."""
    columns = {"x": ["a"] * 20 + ["b"] * 20, "y": ["c"] * 18 + ["d"] * 22}
    assert list(tellable(columns)) == ["x = a", "x = b"]
    same = {"x": ["a"] * 20 + ["b"] * 20, "y": ["c"] * 20 + ["d"] * 20}
    assert list(tellable(same)) == ["x = a", "x = b", "y = c", "y = d"]
    crossed = {"x": ["a"] * 20 + ["b"] * 20, "y": ["c", "d"] * 20}
    assert len(tellable(crossed)) == 4


def test_names_are_one_line_and_few() -> None:
    assert named("ward", " A\nB\x00 ") == "ward = A B"
    assert named("ward", "") == named("ward", None) == ""
    assert named("age", 0) == "age = 0"
    assert len(tellable({"x": [str(i // 10) for i in range(10 * MOST + 50)]})) == MOST


def test_values_that_no_name_tells_apart_are_not_one_subgroup() -> None:
    """Names end after 40 characters; a long value by itself is told, with an ellipsis."""
    ward = "Department of internal medicine, ward north-"
    alike = {"x": [ward + "east"] * 15 + [ward + "west"] * 15 + ["other"] * 20}
    assert list(tellable(alike)) == ["x = other"]
    assert len(tellable({"x": [ward + "east"] * 15 + ["other"] * 20})) == 2
    spaced = {"x": [" A  B"] * 15 + ["A B"] * 15}
    assert {name: len(places) for name, places in tellable(spaced).items()} == {"x = A B": 30}
