"""Preferences as people publish them, and what holds none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from grandrounds.data.conversations import Turn
from grandrounds.data.preferences import Preference, Preferences
from grandrounds.data.sources import load_preferences, load_rows
from grandrounds.data.survey import survey
from grandrounds.errors import DataError

GOOD = {"prompt": "What is fever?", "chosen": "Warmth.", "rejected": "Cold."}
ASKED = {"role": "user", "content": "What is fever?"}
WARMTH, COLD = ({"role": "assistant", "content": text} for text in ("Warmth.", "Cold."))
EARLIER = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
SPOKEN = "\n\nHuman: A?\n\nAssistant: B."
SAID: tuple[Turn, ...] = (("user", "A?"), ("assistant", "B."))


def read(folder: Path, *rows: Any) -> Preferences:
    (path := folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(str(path))


@pytest.mark.parametrize(
    ("row", "before"),
    [
        (GOOD, ()),
        ({**GOOD, "prompt": [ASKED]}, ()),
        ({"prompt": "What is fever?", "chosen": [WARMTH], "rejected": [COLD]}, ()),
        ({"prompt": [*EARLIER, ASKED], "chosen": [WARMTH], "rejected": "Cold."}, SAID),
        ({"prompt": ASKED["content"], "chosen": [ASKED, WARMTH], "rejected": [ASKED, COLD]}, ()),
        ({"chosen": [*EARLIER, ASKED, WARMTH], "rejected": [*EARLIER, ASKED, COLD]}, SAID),
        ({"prompt": "A?", "chosen": [*EARLIER, ASKED, WARMTH],
          "rejected": [*EARLIER, ASKED, COLD]}, SAID),
        (
            {
                "chosen": f"{SPOKEN}\n\nHuman: What is fever?\n\nAssistant: Warmth.",
                "rejected": f"{SPOKEN}\n\nHuman: What is fever?\n\nAssistant: Cold.",
            },
            SAID,
        ),
    ],
    ids=[
        *("text", "a list of one turn", "answers as turns", "turns and text", "whole turns"),
        *("no prompt", "the first question as prompt", "a dialogue as text"),
    ],
)  # fmt: skip
def test_each_form_gives_a_prompt_with_two_answers(
    tmp_path: Path, row: dict[str, Any], before: tuple[Turn, ...]
) -> None:
    found = read(tmp_path, row)
    assert found.pairs == (Preference(before, "What is fever?", "Warmth.", "Cold."),)
    assert found.counted == "1 pair of answers"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "chosen": " "}, "chosen is empty"),
        ({**GOOD, "rejected": None}, "rejected is empty"),
        ({**GOOD, "rejected": []}, "rejected is empty"),
        ({**GOOD, "rejected": " Warmth. "}, "chosen and rejected are equal"),
        ({"chosen": "Warmth.", "rejected": "Cold."}, "there is no prompt"),
        ({**GOOD, "prompt": ""}, "chosen: turn 1 is empty"),
        ({**GOOD, "chosen": 5}, "chosen is of type int, neither text nor a list of turns"),
        ({**GOOD, "chosen": [ASKED]}, "chosen: no answer of the assistant"),
        (
            {**GOOD, "rejected": [ASKED, {"role": "tool", "content": "4"}, COLD]},
            "rejected: turn 2 uses a tool",
        ),
        (
            {"chosen": [ASKED, WARMTH], "rejected": [{**ASKED, "content": "Else?"}, COLD]},
            "chosen and rejected answer different prompts",
        ),
        (
            {"prompt": "Else?", "chosen": [ASKED, WARMTH], "rejected": [ASKED, COLD]},
            "the prompt is not that of chosen",
        ),
    ],
)
def test_what_holds_no_preference_is_named_by_its_line(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    found = read(tmp_path, GOOD, row, GOOD)
    assert len(found.pairs) == 2
    assert found.left_out == (f"line 2: {reason}",)
    assert found.counted.startswith("2 pairs of answers in 3 rows; 1 has none, the first: line")


def test_parquet_holds_preferences_and_a_column_may_lack(tmp_path: Path) -> None:
    rows = [{"chosen": [ASKED, WARMTH], "rejected": [ASKED, COLD], "score": 1.0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    [pair] = load_preferences(str(tmp_path / "pairs.parquet")).pairs
    assert pair == Preference((), "What is fever?", "Warmth.", "Cold.")
    with pytest.raises(DataError, match=r"there is no column 'rejected'; .*these are: chosen"):
        read(tmp_path, {"chosen": "Warmth."})


@pytest.mark.parametrize(
    ("row", "columns", "advice"),
    [
        (GOOD, ("prompt", "chosen"), "data.question-column=prompt data.answer-column=chosen"),
        (
            {"chosen": [ASKED, WARMTH], "rejected": [ASKED, COLD]},
            ("chosen", "output"),
            "write data.question-column=chosen.",
        ),
        ({"chosen": SPOKEN, "rejected": "C"}, None, "a column of their"),
    ],
)
def test_a_run_counts_them_and_says_how_to_train_on_the_chosen(
    tmp_path: Path, row: dict[str, Any], columns: tuple[str, str] | None, advice: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "rejected": ""}) + "\n")
    with pytest.raises(DataError) as caught:
        survey(str(path), "input", "output")
    assert "in 2 rows; " in str(caught.value)
    assert advice in str(caught.value)
    if columns:
        question, answer = columns
        rows = load_rows(str(path), question_column=question, answer_column=answer)
        assert (rows[question][0], rows[answer][0]) == ("What is fever?", "Warmth.")
