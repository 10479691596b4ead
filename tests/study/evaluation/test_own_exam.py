"""Exams of the user's own: every way of writing options and answers, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import ConfigError, DataError
from grandrounds.study.evaluation import likelihood
from grandrounds.study.evaluation.own_exam import (
    load_own_exams,
    own_benchmark,
    read_exam,
    style_of,
)
from tests.study.evaluation.small import write_lines

DRUGS = ["aspirin", "ibuprofen", "codeine"]


def lines(folder: Path, *rows: dict[str, Any]) -> Path:
    return write_lines(folder / "exam.jsonl", rows)


def row(answer: Any, options: Any = DRUGS, question: str = "Which drug?") -> dict[str, Any]:
    return {"question": question, "options": options, "answer": answer}


def golds(file: Path) -> list[str]:
    """Return the text of each correct option."""
    return [item.options[item.gold_index] for item in read_exam(file)]


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["B", "b", " B ", "ibuprofen", "1", 1, 1.0])
def test_an_answer_is_a_letter_an_index_from_0_or_the_text(tmp_path: Path, answer: Any) -> None:
    assert golds(lines(tmp_path, row(answer), row(0))) == ["ibuprofen", "aspirin"]


@pytest.mark.parametrize(
    "options",
    [
        DRUGS,
        {"A": "aspirin", "B": "ibuprofen", "C": "codeine"},
        {"c": "codeine", "a": "aspirin", "b": "ibuprofen", "d": None},
        json.dumps(DRUGS),
        json.dumps({"A": "aspirin", "B": "ibuprofen", "C": "codeine"}),
    ],
)
def test_options_are_a_list_or_a_mapping_from_letter_to_text(tmp_path: Path, options: Any) -> None:
    (item,) = read_exam(lines(tmp_path, row("B", options)))
    assert (item.options, item.labels, item.gold_index) == (tuple(DRUGS), ("A", "B", "C"), 1)


@pytest.mark.parametrize(
    "heading",
    [
        "A,B,C",
        "option_a,option_b,option_c",
        "opa,opb,opc",
        "Option 1,Option 2,Option 3",
        "opt0,opt1,opt2",
    ],
)
def test_each_option_may_have_a_column_and_every_cell_of_a_csv_is_text(
    tmp_path: Path, heading: str
) -> None:
    """A file may name 1.50 and 2.0, which as numbers would be 1.5 and 2."""
    file = tmp_path / "exam.csv"
    file.write_text(f"id,Question,{heading},Answer\n1,How much?,1.50,2.0,,A\n2,Or?,1,2,3,C\n")
    first, second = read_exam(file)
    assert (first.options, first.gold_index) == (("1.50", "2.0"), 0)
    assert (second.options, second.gold_index) == (("1", "2", "3"), 2)


def test_the_same_exam_reads_alike_from_every_format(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [row("C"), row("aspirin", DRUGS[:2], "Or which?")]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "exam.parquet")
    (tmp_path / "exam.json").write_text(json.dumps(rows))
    (tmp_path / "exam.csv").write_text(
        'question,options,answer\nWhich drug?,"[""aspirin"", ""ibuprofen"", ""codeine""]",C\n'
        'Or which?,"[""aspirin"", ""ibuprofen""]",aspirin\n'
    )
    expected = [(i.question, i.options, i.gold_index) for i in read_exam(lines(tmp_path, *rows))]
    for ending in ("parquet", "json", "csv"):
        found = read_exam(tmp_path / f"exam.{ending}")
        assert [(i.question, i.options, i.gold_index) for i in found] == expected


def test_a_limit_takes_so_many_items_and_the_benchmark_counts_all(tmp_path: Path) -> None:
    (task,) = load_own_exams([lines(tmp_path, *[row("A")] * 5)], limit=2)
    assert (len(task.items), task.benchmark.expected_items) == (2, 5)
    assert (task.benchmark.name, task.benchmark.title) == ("own-exam", "exam.jsonl")
    assert set(task.source) == {"file", "sha256"}


def test_whole_options_are_asked_in_the_runs_prompt_and_letters_in_medmcqas(tmp_path: Path) -> None:
    (item,) = read_exam(lines(tmp_path, row("A")))
    texts, letters = (own_benchmark("own-x", "x", style_of(s), 1) for s in ("texts", "letters"))
    assert likelihood.answer_texts(texts, item) == tuple(DRUGS)
    assert not likelihood.shows_letters(texts)
    assert "codeine" not in likelihood.build_prompt(texts, item)
    assert likelihood.answer_texts(letters, item) == ("A", "B", "C")
    assert "C. codeine\nAnswer:" in likelihood.build_prompt(letters, item)
    with pytest.raises(ConfigError, match="Did you mean 'letters'"):
        style_of("letter")


# --- What is refused ------------------------------------------------------------------------------


def refusal(*files: Path) -> str:
    with pytest.raises(DataError) as error:
        load_own_exams(files)
    return str(error.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(""), "no answer"),
        (row(None), "no answer"),
        (row(True), "no answer"),
        (row("D"), "'D' is none of: a letter A to C, an index 0 to 2, the text of an option"),
        (row(3), "'3' is none of"),
        (row(-1), "'-1' is none of"),
        (row("A", question=" "), "no question"),
        (row("A", ["one"]), "1 option(s), at least 2 are needed"),
        (row("A", None), "no options"),
        (row("A", "one, two"), "no JSON list or mapping"),
        (row("A", 7), "neither list nor mapping"),
        (row("A", ["one", "", "two"]), "option B is empty"),
        (row("A", ["one", "one"]), "two options have the same text"),
        (row("A", {"A": "one", "C": "two"}), "the options' letters are A, C, not A, B, ..."),
        (row("A", [["one"], "two"]), "a value of type list where text is expected"),
        (row("A", [str(i) for i in range(27)]), "27 options, at most 26"),
        (row("C", ["C", "A", "B"]), "the text of one option and names another: write the letter"),
        (row(1, ["1", "2", "0"]), "the text of one option and names another: write the letter"),
        (row("A", ["\ud800", "two"]), "unpaired surrogate"),
    ],
)
def test_a_row_that_is_no_item_is_named_with_its_line(
    tmp_path: Path, bad: dict[str, Any], said: str
) -> None:
    told = refusal(lines(tmp_path, row(0), bad, row("A")))
    assert "exam.jsonl: 1 of 3 lines cannot be used: line 2: " in told
    assert said in told


def test_indices_without_a_0_are_refused_since_they_may_count_from_1(tmp_path: Path) -> None:
    told = refusal(lines(tmp_path, row(1), row(2), row("ibuprofen")))
    assert "lines 1, 2: the answer is an index, and no answer of the file is 0" in told


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    one = lines(tmp_path, row(""), row("A"), row("E"), row(None))
    two = tmp_path / "other.csv"
    two.write_text("question,A,B,answer\nWhich?,x,x,A\n")
    told = refusal(one, tmp_path / "nowhere.csv", two)
    assert "3 of 4 lines cannot be used: lines 1, 4: no answer; line 3: the answer 'E'" in told
    assert "nowhere.csv: no such file" in told
    assert "other.csv: 1 of 1 rows cannot be used: row 1: two options have the same text" in told


def test_many_problems_name_every_row_once(tmp_path: Path) -> None:
    rows = [row(f"answer {i}") for i in range(20)]
    told = refusal(lines(tmp_path, *rows))
    assert "20 of 20 lines" in told
    assert told.endswith(
        "and other problems in lines 13, 14, 15, 16, 17, 18, 19, 20. Correct or remove them."
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["question", "answer"], "no column options (or one column per option"),
        (["prompt", "A", "B", "label"], "no column question, answer; the columns are: prompt"),
        (["question", "options", "A", "B", "answer"], "both a column 'options' and one column per"),
        (["question", "A", "answer"], "no column options"),
    ],
)
def test_missing_columns_are_told_with_those_that_are_there(
    tmp_path: Path, columns: Sequence[str], said: str
) -> None:
    assert said in refusal(lines(tmp_path, dict.fromkeys(columns, "A")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("exam.txt", "x", "files ending in '.txt' cannot be read; allowed: .json"),
        ("exam.jsonl", "", "the columns are: none"),
        ("exam.jsonl", "{", "line 1: not valid JSON"),
        ("exam.csv", "question,A,B,answer\n", "there are no rows"),
        ("exam.csv.gz", "x", "is damaged or cannot be read"),
    ],
)
def test_a_file_that_is_no_exam_is_one_clear_error(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    assert said in refusal(tmp_path / name)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [lines(tmp_path, row("A")), lines(tmp_path / "b", row("A"))]
    with pytest.raises(ConfigError, match=r"need different names: .*exam.jsonl, .*exam.jsonl"):
        load_own_exams(files)


def test_a_file_name_that_is_no_text_is_shown_and_written_without_it(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"ward\xff\x1b.csv")
    try:
        file.write_text("question,A,B,answer\nWhich?,one,two,A\n")
    except OSError:
        pytest.skip("the file system knows no such name")
    (task,) = load_own_exams([file])
    assert (task.benchmark.title, task.source["file"]) == ("ward.csv", "ward.csv")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", "[" * 100_000),
        ("deep.jsonl", '{"question": ' + "[" * 100_000),
        ("deep.csv", "question,options,answer\nWhich?," + "[" * 100_000 + ",A\n"),
    ],
)
def test_nesting_beyond_the_readers_depth_is_one_clear_error(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"nested too deeply|no JSON list or mapping"):
        load_own_exams([tmp_path / name])
