"""Units of a site's data: no unit's side, or records, follow from those of another."""

from __future__ import annotations

import pytest

from grandrounds.data.rows import Rows
from grandrounds.errors import DataError
from grandrounds.site.private.units import (
    UnitRule,
    alike,
    chosen_records,
    grouped,
    is_held_out,
    split_by_unit,
)

SECRET = b"s" * 32
COLUMNS = {"question_column": "input", "answer_column": "output"}


def rows_of(patients: list[str | None], same: int = 0) -> Rows:
    """Return a record for each entry; the first `same` of them with one text."""
    texts = [f"text {max(i, same - 1) if i < same else i}" for i in range(len(patients))]
    return Rows({"who": patients, "input": texts, "output": [f"answer to {t}" for t in texts]})


def sides(rows: Rows, column: str = "who", most: int = 8) -> tuple[set[str], set[str]]:
    """Return the questions that train, and those held out."""
    split = split_by_unit(rows, UnitRule(SECRET, column, most), fraction=0.4, **COLUMNS)
    return {e.question for e in split.train}, {e.question for e in split.held_out}


@pytest.mark.parametrize("column", ["who", ""])
def test_held_out_split_is_per_unit(column: str) -> None:
    """One unit more or less changes nothing for the others; a patient's records stay together."""
    patients: list[str | None] = [f"p{i // 2}" for i in range(40)]
    whole, fewer = sides(rows_of(patients), column), sides(rows_of(patients[:38]), column)
    assert whole[0] - fewer[0] <= {"text 38", "text 39"}
    assert whole[1] - fewer[1] <= {"text 38", "text 39"}
    assert fewer[0] <= whole[0]
    assert fewer[1] <= whole[1]
    assert len(whole[0]) > 10 < len(whole[0]) + len(whole[1])
    if column:
        assert all((f"text {i}" in whole[0]) == (f"text {i + 1}" in whole[0]) for i in (0, 2, 4))


def test_the_share_held_out_is_the_fraction_and_follows_from_the_secret() -> None:
    """1,000 units at 0.2: 200, and 12.6 is a standard deviation."""
    held = [is_held_out(SECRET, f"p{i}", 0.2) for i in range(1000)]
    assert sum(held) == pytest.approx(200, abs=4 * 12.6)
    assert held != [is_held_out(b"t" * 32, f"p{i}", 0.2) for i in range(1000)]
    assert not any(is_held_out(SECRET, f"p{i}", 0.0) for i in range(100))


def test_the_records_of_a_unit_are_chosen_by_themselves() -> None:
    """With one record fewer, the chosen of the others stay chosen."""
    split = split_by_unit(rows_of(["a"] * 9), UnitRule(SECRET, "who", 9), fraction=0.0, **COLUMNS)
    records = list(split.train)
    chosen = chosen_records(SECRET, records, 4)
    for record in records:
        others = [r for r in records if r != record]
        assert set(chosen) - {record} <= set(chosen_records(SECRET, others, 4))
    assert len(chosen) == 4
    assert chosen_records(SECRET, [records[0]] * 3, 4) == (records[0],)


def test_equal_records_are_two_units_or_one_of_a_patient() -> None:
    """A record that another unit has too is not dropped: that would couple the units."""
    rows = rows_of(["a", "a", "b", "c"], same=3)
    by_record = split_by_unit(rows, UnitRule(SECRET), fraction=0.0, **COLUMNS)
    by_patient = split_by_unit(rows, UnitRule(SECRET, "who"), fraction=0.0, **COLUMNS)
    assert by_record.units == (0, 1, 2, 3)
    assert by_patient.units == (0, 1, 2)
    assert by_patient.report.duplicate_rows == 1


def test_records_of_nobody_are_left_out() -> None:
    split = split_by_unit(
        rows_of(["a", None, "", "b"]), UnitRule(SECRET, "who"), fraction=0.0, **COLUMNS
    )
    assert (split.units, split.report.empty_rows) == ((0, 1), 2)


def test_a_column_that_is_not_there_is_told() -> None:
    with pytest.raises(DataError, match=r"privacy\.unit-column"):
        split_by_unit(rows_of(["a"]), UnitRule(SECRET, "patient"), fraction=0.0, **COLUMNS)


def test_records_are_grouped_by_unit() -> None:
    assert grouped((0, 1, 0, 2), "abcd") == [["a", "c"], ["b"], ["d"]]
    assert grouped((), ()) == []


@pytest.mark.parametrize(
    "two",
    [("J\u00f6rg", "Jo\u0308rg"), ("P1", "P1\u200b"), ("P1", "\ufeffP1 "), ("P\u00ad1", "P1")],
)
def test_a_name_in_two_spellings_that_look_alike_is_one_unit(two: tuple[str, str]) -> None:
    split = split_by_unit(rows_of([*two]), UnitRule(SECRET, "who"), fraction=0.0, **COLUMNS)
    assert split.units == (0, 0)


def test_names_that_may_mean_one_unit_are_found_and_stay_two() -> None:
    names = ["P1", "p1", "17", "17.0", "017", "17a", "P2", "1.5", "-17"]
    assert alike(names) == [("P1", "p1"), ("17", "17.0"), ("17", "017")]
    split = split_by_unit(rows_of([*names]), UnitRule(SECRET, "who"), fraction=0.0, **COLUMNS)
    assert len(set(split.units)) == len(names)
