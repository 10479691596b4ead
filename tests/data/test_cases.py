"""Files that users of such software have: every row is used, or counted and named."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grandrounds.data import large, sources
from grandrounds.data.examples import Example, SiteData, split_rows
from grandrounds.data.partitioning import Division, Partition, partition_rows
from grandrounds.data.rows import Rows
from grandrounds.data.sources import load_rows
from grandrounds.data.survey import survey
from tests.places import SHARED

CASES = SHARED / "cases"

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/data")


@pytest.fixture(params=["in memory", "on the disk"], autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each case as a small source, and as one that is larger than memory."""
    sources._load_files.cache_clear()
    if request.param == "on the disk":
        monkeypatch.setattr(large, "STORED_BYTES", 0)


def loaded(file: Path, *kept: str) -> Rows:
    return load_rows(str(file), question_column="input", answer_column="output", keep_columns=kept)


def site(rows: Rows) -> SiteData:
    columns = {"question_column": "input", "answer_column": "output"}
    return split_rows(rows, Partition(42, 0, 1), held_out_fraction=0.0, **columns)


@pytest.mark.parametrize(("name", "column"), [("wards.csv", "ward"), ("hospitals.csv", "site")])
def test_every_text_is_a_site_of_its_own_in_csv_and_json_lines(
    tmp_path: Path, name: str, column: str
) -> None:
    with (CASES / name).open(encoding="utf-8-sig", newline="") as file:
        records = list(csv.DictReader(file))
    lines = tmp_path / "same.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    written = Counter(record[column] for record in records)
    found = []
    for source in (CASES / name, lines):
        rows = loaded(source, column)
        assert Counter(rows[column]) == written
        by_column, count = Division("natural", column, 0.5), len(written)
        sites = [partition_rows(rows, by_column, Partition(42, k, count)) for k in range(count)]
        assert [set(one[column]) for one in sites] == [{value} for value in sorted(written)]
        found.append([list(zip(one["input"], one["output"], strict=True)) for one in sites])
    assert found[0] == found[1]
    surveyed = survey(str(CASES / name), "input", "output", column)
    assert surveyed is not None
    assert surveyed.usable_by_label == written


def test_alpaca_loses_no_row_and_joins_instruction_and_input() -> None:
    rows: list[dict[str, Any]] = json.loads((CASES / "alpaca.json").read_text())
    found = site(loaded(CASES / "alpaca.json"))
    assert [(e.question, e.answer) for e in found.train] == [
        (f"{row['instruction']} {row['input']}".strip(), row["output"]) for row in rows
    ]


def test_sharegpt_is_the_same_as_messages(tmp_path: Path) -> None:
    names = {"human": "user", "gpt": "assistant"}
    as_messages = tmp_path / "messages.jsonl"
    rows = [json.loads(line) for line in (CASES / "sharegpt.jsonl").read_text().splitlines()]
    as_messages.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": names[turn["from"]], "content": turn["value"]}
                        for turn in row["conversations"]
                    ]
                }
            )
            + "\n"
            for row in rows
        )
    )
    found = site(loaded(CASES / "sharegpt.jsonl"))
    assert found.report.train_examples == len(rows) == 12
    assert list(found.train) == list(site(loaded(as_messages)).train)
    assert found.train[0] == Example("What is drug 0 used for?", "Drug 0 treats fever number 0.")


def test_of_conversations_the_usable_ones_are_trained_on() -> None:
    found = site(loaded(CASES / "messages.jsonl"))
    assert (found.report.rows, found.report.empty_rows) == (8, 5)
    assert [e.question for e in found.train] == [
        "And in a newborn?",
        "Define tachycardia.",
        "Define bradycardia.\n\nIn adults, please.",
    ]
    assert [role for role, _ in found.train[0].before] == ["system", "user", "assistant"]


def test_odd_text_is_read_as_it_stands() -> None:
    found = site(loaded(CASES / "odd_text.jsonl"))
    assert (found.report.rows, found.report.empty_rows, found.report.duplicate_rows) == (22, 1, 0)
    said = {e.question: e.answer for e in found.train}
    assert "Null?" not in said
    assert said["Temp?"] == "37.5"
    assert said["Fever?"] == "True"
    assert said["What is a naïve T cell?"].endswith("🧬")
    assert said["Dose {mg} of 'x' <b>%s</b> {{y}}?"] == "5\u202fmg\u2028then 10 mg\u00a0daily"
    assert said["\ufeffBOM inside?"] == "yes"
    assert said["Nul\0char?"] == "a\0b"
    assert said["Tab\tand\r\nCRLF"] == "line1\r\nline2"
    assert said["</s><eos><|end|> tokens"] == "The answer.<eos>"
