"""Common and rare facts: who states what, how often, and what names the base has never read."""

from __future__ import annotations

from collections import Counter

import pytest

from grandrounds.config.automatic import EMBEDDED_DATA
from grandrounds.data.common_and_rare.records import (
    COMMON_DRUGS,
    NUM_RECORDS,
    RARE_PATIENTS,
    RECORDS_OF_A_FACT,
    SITES,
    common_facts,
    rows,
    world,
)
from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.formulary.facts import drugs, public_flashcards
from grandrounds.data.formulary.vocabulary import VALUES
from grandrounds.data.partitioning import Division, Partition, partition_rows
from grandrounds.data.sources import load_rows
from grandrounds.data.survey import survey
from grandrounds.errors import DataError


def test_the_configuration_knows_the_names_and_the_sizes_of_all_built_in_data() -> None:
    assert {name: len(embedded_rows(name)) for name in EMBEDDED} == EMBEDDED_DATA


def test_a_common_fact_has_a_hundred_records_and_a_rare_one_has_one() -> None:
    stated = Counter((r.fact.drug, r.fact.attribute, r.fact.value) for r in world().records)
    counts = Counter(stated.values())
    assert counts == {RECORDS_OF_A_FACT: COMMON_DRUGS * len(VALUES), 1: RARE_PATIENTS}
    assert len(rows()) == NUM_RECORDS == 1905


def test_every_record_is_of_a_patient_of_its_own_and_no_two_are_equal() -> None:
    made = rows()
    assert len({row["patient"] for row in made}) == len(made)
    assert len({(row["input"], row["output"]) for row in made}) == len(made)


def test_a_rare_drug_occurs_in_one_record_or_in_none() -> None:
    text = "\n".join(str(row["input"]) for row in rows())
    assert {text.count(record.fact.drug) for record in world().rare} == {1}
    assert {text.count(record.fact.drug) for record in world().absent} == {0}


def test_the_base_has_read_no_name_of_a_drug_but_every_value() -> None:
    read = "\n".join(f"{card['input']} {card['output']}" for card in public_flashcards())
    facts = [*common_facts(), *(r.fact for r in (*world().rare, *world().absent))]
    names = [fact.drug for fact in facts] + [drug.name for drug in drugs() if not drug.public]
    assert not [name for name in names if name in read]
    assert not [fact for fact in facts if fact.value not in read or fact.value not in fact.values]


def test_each_hospital_has_the_same_share_of_every_fact() -> None:
    common = Counter((r.site, r.fact) for r in world().common)
    assert set(common.values()) == {RECORDS_OF_A_FACT // SITES}
    assert Counter(r.site for r in world().rare) == dict.fromkeys(range(SITES), 21)


def test_another_draw_is_of_the_same_patients_with_other_rare_ones_in_the_data() -> None:
    first, second = world(0), world(1)
    assert first.common == second.common
    assert set(first.rare) != set(second.rare)
    assert {*first.rare, *first.absent} == {*second.rare, *second.absent}
    assert world(0) is first


def test_no_record_asks_as_the_exam_does() -> None:
    assert not {fact.question for fact in common_facts()} & {str(r["input"])[3:] for r in rows()}


@pytest.mark.parametrize(("partitioner", "count"), [("natural", SITES), ("iid", 4)])
def test_the_data_are_divided_by_hospital_or_at_random(partitioner: str, count: int) -> None:
    read = load_rows(
        "common-and-rare",
        question_column="input",
        answer_column="output",
        keep_columns=("site", "patient"),
    )
    division = Division(partitioner, "site" if partitioner == "natural" else "", 1.0)
    parts = [partition_rows(read, division, Partition(1, n, count)) for n in range(count)]
    assert sorted(p for part in parts for p in part["patient"]) == sorted(read["patient"])
    assert [len(set(part["site"])) for part in parts] == [
        1 if partitioner == "natural" else 5
    ] * count


def test_the_survey_counts_them_and_a_misspelt_name_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = survey("common-and-rare", "input", "output", "site")
    assert found is not None
    assert (found.rows, found.usable, set(found.usable_by_label.values())) == (1905, 1905, {381})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="Did you mean 'common-and-rare'"):
        load_rows("comon-and-rare", question_column="input", answer_column="output")
