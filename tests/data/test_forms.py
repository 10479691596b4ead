"""Data as people have them: the same examples in every form, and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from grandrounds.data.conversations import Unusable, conversation_of
from grandrounds.data.examples import Example, split_rows
from grandrounds.data.partitioning import Partition
from grandrounds.data.sources import load_rows
from grandrounds.data.survey import Survey, survey
from grandrounds.errors import DataError
from tests.places import SHARED

PAIRS = [("What is fever?", "Warmth."), ("Is it bad?", "At times."), ("For whom?", "Children.")]


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


ROWS: list[dict[str, Any]] = [{"input": q, "output": a} for q, a in PAIRS]
FORMS: dict[str, str] = {
    "lines.jsonl": lines(ROWS),
    "array.json": json.dumps(ROWS),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "table.csv": "input,output\n" + "".join(f"{q},{a}\n" for q, a in PAIRS),
    "table.tsv": "input\toutput\n" + "".join(f"{q}\t{a}\n" for q, a in PAIRS),
    "alpaca.json": json.dumps([{"instruction": q, "input": "", "output": a} for q, a in PAIRS]),
    "no-input.jsonl": lines([{"instruction": q, "output": a} for q, a in PAIRS]),
    "completion.jsonl": lines([{"prompt": q, "completion": a} for q, a in PAIRS]),
    "messages.jsonl": lines([{"messages": turns(q, a)} for q, a in PAIRS]),
    "sharegpt.json": json.dumps(
        [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in PAIRS
        ]
    ),
    "parts.jsonl": lines(
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": q}]},
                    turns(q, a)[1],
                ]
            }
            for q, a in PAIRS
        ]
    ),
}


def examples(source: Path | str) -> tuple[Example, ...]:
    rows = load_rows(str(source), question_column="input", answer_column="output")
    site = Partition(42, 0, 1)
    columns = {"question_column": "input", "answer_column": "output"}
    return split_rows(rows, site, held_out_fraction=0.0, **columns).train


def surveyed(source: Path | str) -> Survey:
    found = survey(str(source), "input", "output")
    assert found is not None
    return found


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name])
    assert [(e.question, e.answer, e.before) for e in examples(path)] == [
        (question, answer, ()) for question, answer in PAIRS
    ]
    assert surveyed(path).usable == len(PAIRS)


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_parquet_holds_conversations(tmp_path: Path, form: str) -> None:
    content = [json.loads(line) for line in FORMS["messages.jsonl"].splitlines()]
    path = tmp_path / "chat.parquet"
    if form == "sharegpt":
        content = json.loads(FORMS["sharegpt.json"])
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    assert [(e.question, e.answer) for e in examples(path)] == PAIRS


def test_files_of_a_folder_and_of_a_pattern_follow_one_another(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(lines([row]))
    (tmp_path / "notes.txt").write_text("not data")
    for source in (tmp_path, tmp_path / "*.jsonl"):
        assert [(e.question, e.answer) for e in examples(source)] == PAIRS
    (tmp_path / "2.jsonl").write_text(lines([{"input": ["q"], "output": "a"}]))
    with pytest.raises(DataError, match=r"2\.jsonl, line 1, column 'input': the value is a list"):
        examples(tmp_path)
    (tmp_path / "2.jsonl").write_text(lines([{"question": "q", "output": "a"}]))
    with pytest.raises(DataError, match=r"2\.jsonl: there is no column 'input', which .*0\.jsonl"):
        examples(tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(DataError, match="no file has such a name"):
        examples(tmp_path / "in*")


def test_a_column_that_nobody_reads_is_told(tmp_path: Path) -> None:
    (path := tmp_path / "a.jsonl").write_text(lines([{**row, "context": "c"} for row in ROWS]))
    assert surveyed(path).unread == ("context",)


def test_preferences_are_no_answers(tmp_path: Path) -> None:
    rows = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in PAIRS]
    (path := tmp_path / "a.jsonl").write_text(lines(rows))
    with pytest.raises(DataError, match=r"write data.question-column=prompt data.answer-column="):
        examples(path)
    found = load_rows(str(path), question_column="prompt", answer_column="chosen")
    assert found["chosen"] == [answer for _, answer in PAIRS]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (["A."], "a list of length 1, but only text, numbers and missing values are supported. Wr"),
        (["A.", "B."], "length 2, but .* supported. Write its texts as one, or as rows, or set da"),
        ([], "the value is an empty list, but only text"),
        ([{"role": "user", "content": "A?"}], "If these are turns of a conversation, name the co"),
        ({"text": ["a"], "start": [3]}, "an object with the keys text, start, but .* one of its k"),
    ],
    ids=["a list of one", "a list", "an empty list", "turns", "an object"],
)
@pytest.mark.parametrize(("column", "key"), [("input", "question"), ("output", "answer")])
def test_what_is_no_text_is_told_with_line_column_and_key(
    tmp_path: Path, value: Any, told: str, column: str, key: str
) -> None:
    (path := tmp_path / "a.jsonl").write_text(lines([ROWS[0], {**ROWS[1], column: value}]))
    with pytest.raises(
        DataError, match=rf"a\.jsonl, line 2, column '{column}': .*{told}"
    ) as caught:
        examples(path)
    assert f"or set data.{key}-column to another column." in str(caught.value)


def test_numbers_are_read_as_they_are_written_and_null_is_no_answer(tmp_path: Path) -> None:
    answers = [3, 2.50, True, None, float("nan")]
    rows = [{"input": f"A{i}?", "output": answer} for i, answer in enumerate(answers)]
    (path := tmp_path / "a.jsonl").write_text(lines(rows))
    assert [e.answer for e in examples(path)] == ["3", "2.5", "True"]


def test_rows_after_the_first_hundred_may_have_no_other_columns(tmp_path: Path) -> None:
    early = {"prompt": "A?", "completion": "B."}
    (path := tmp_path / "a.jsonl").write_text(lines([early] * 100 + ROWS))
    with pytest.raises(DataError, match="column 'input' is in none of the first 100 rows and in"):
        examples(path)


def test_turns_before_the_last_question_are_kept() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        *turns("A?", "B."),
        {"role": "user", "content": "C?"},
        {"role": "user", "content": " In adults. "},
        {"role": "assistant", "content": "D."},
        {"role": "user", "content": "Thanks."},
    ]
    found = conversation_of(said)
    assert (found.question, found.answer) == ("C?\n\nIn adults.", "D.")
    assert found.before == (("system", "Be brief."), ("user", "A?"), ("assistant", "B."))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([], "no turns"),
        (turns("A?", "B.")[:1], "no answer of the assistant"),
        (turns("A?", "B.")[1:], "the assistant speaks first"),
        (turns("", "B."), "turn 1 is empty"),
        (
            [*turns("A?", "B."), {"role": "system", "content": "C"}, *turns("D", "E")],
            "a system pro",
        ),
        ([{"role": "user", "content": "A?"}, {"role": "tool", "content": "4"}], "turn 2 uses a to"),
        ([{"role": "bystander", "content": "A?"}], "turn 1 has the unknown role 'bystander'"),
        ([{"content": "A?"}], "turn 1 has no role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 1 holds more than text"),
        ([{"role": "user", "content": 5}], "turn 1 is of type int, not text"),
        (["A?"], "turn 1 is no object"),
    ],
)
def test_what_is_no_conversation_is_named(said: list[Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        conversation_of(said)


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


@needs_shared
def test_the_chat_file_of_the_cases() -> None:
    found = surveyed(SHARED / "cases/messages.jsonl")
    assert (found.rows, found.usable, found.conversations) == (8, 3, 1)
    assert found.left_out == (
        "line 4: no answer of the assistant",
        "line 5: turn 2 uses a tool",
        "line 6: the assistant speaks first",
        "line 7: no turns",
        "line 8: turn 1 is empty",
    )
    assert [e.question for e in examples(SHARED / "cases/messages.jsonl")] == [
        "And in a newborn?",
        "Define tachycardia.",
        "Define bradycardia.\n\nIn adults, please.",
    ]
