"""Plain text: found by its column, learned as a whole, and never in a prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grandrounds.config.recipes import overlaid, resolve
from grandrounds.data.conversations import PLAIN_TEXT
from grandrounds.data.examples import Example, split_rows
from grandrounds.data.partitioning import Partition
from grandrounds.data.sources import load_rows
from grandrounds.data.survey import survey
from grandrounds.data.tokenization import (
    IGNORED_LABEL,
    collate,
    prompt_token_ids,
    tokenize_examples,
)
from grandrounds.errors import DataError
from grandrounds.study import preflight
from grandrounds.study.sites import with_sites
from tests.data.test_own_prompt import metaspace

NOTES = ["Fever for three days.", "Rest and tea.", "Fever for three days.", " "]
TEXT = Example(NOTES[0], NOTES[0], PLAIN_TEXT)


def notes(path: Path, column: str = "text", **more: Any) -> str:
    path.write_text("".join(json.dumps({column: note} | more) + "\n" for note in NOTES))
    return str(path)


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
def test_a_named_column_of_text_is_read_as_such(tmp_path: Path, alone: bool) -> None:
    how = {"question_column": "", "answer_column": "note"}
    rows = load_rows(notes(tmp_path / "a.jsonl", "note"), alone=alone, **how)
    split = split_rows(rows, Partition(0, 0, 1), held_out_fraction=0.0, **how)
    assert split.train == (TEXT, Example(NOTES[1], NOTES[1], PLAIN_TEXT))
    assert (split.report.empty_rows, split.report.duplicate_rows) == (1, 1)


def test_a_column_called_text_is_found_where_no_question_is(tmp_path: Path) -> None:
    found = survey(notes(tmp_path / "a.jsonl", meta="x"), "input", "output")
    assert found is not None
    assert (found.form, found.texts, found.usable) == ("plain text in the column text", 3, 3)
    assert (found.conversations, found.unread) == (0, ("meta",))
    with pytest.raises(DataError, match="no column 'output'"):
        survey(notes(tmp_path / "b.jsonl", input="Why?"), "input", "output")


def test_all_is_learned_but_the_first_token(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    [found] = tokenize_examples([TEXT], tokenizer, "text", 500).examples
    ids = [*tokenizer(NOTES[0])["input_ids"], tokenizer.eos_token_id]
    assert list(found.input_ids) == ids
    labels = collate([found], 0)["labels"][0].tolist()
    assert labels == [IGNORED_LABEL, *ids[1:]]
    assert found.answer_tokens == len(ids) - 1


def test_a_beginning_of_sequence_stands_before_it_once() -> None:
    tokenizer = metaspace()
    [found] = tokenize_examples([TEXT], tokenizer, "text", 500).examples
    assert list(found.input_ids) == [*tokenizer(NOTES[0])["input_ids"], tokenizer.eos_token_id]
    assert found.prompt_tokens == 1
    [asked] = prompt_token_ids(tokenizer, "text", [NOTES[0]])
    assert asked == list(found.input_ids[:-1])


def test_a_long_text_is_cut_and_counted(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    found = tokenize_examples([TEXT, TEXT], tokenizer, "text", 8)
    assert [len(e.input_ids) for e in found.examples] == [8, 8]
    assert (found.truncated, found.unlearnable, found.positions) == (2, 0, (0, 1))
    assert tokenizer.eos_token_id not in found.examples[0].input_ids


@pytest.mark.parametrize("template", ["alpaca", "chat", "{{ question }} {{ answer }}"])
def test_text_in_a_prompt_and_questions_without_one_are_refused(
    tiny_base: Path, template: str
) -> None:
    tokenizer, pair = AutoTokenizer.from_pretrained(tiny_base), Example("Why?", "So.")
    with pytest.raises(DataError, match="1 of 1 examples are plain text"):
        tokenize_examples([TEXT], tokenizer, template, 500)
    with pytest.raises(DataError, match="1 of 2 examples have a question"):
        tokenize_examples([TEXT, pair], tokenizer, "text", 500)
    found = tokenize_examples([pair, TEXT], tokenizer, "text", 500, alone=True)
    assert (found.unlearnable, found.positions) == (1, (1,))


def test_a_run_on_text_has_no_prompt_unless_one_is_set(tmp_path: Path) -> None:
    data = ("--data", {"static.dataset.name": notes(tmp_path / "a.jsonl")})
    layers = with_sites([data, ("--sites", {"data.num-partitions": 2})])
    config = resolve(overlaid(values for _, values in layers))
    assert config.data.prompt_template == "text"
    found = preflight.check_data(config)
    assert found is not None
    told = preflight.warnings(config, found)
    assert any("plain text in the column text, trained on as a whole" in line for line in told)
    layers = with_sites([data, ("--set", {"data.prompt-template": "alpaca"})])
    with pytest.raises(DataError, match="plain text, without question"):
        preflight.check_data(resolve(overlaid(values for _, values in layers)))


def test_a_file_of_text_has_one_a_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"\xef\xbb\xbfFever.\r\nThree days.\r\n\r\n \r\n\r\nRest.\n")
    rows = load_rows(str(file), question_column="input", answer_column="output")
    assert rows["output"] == ["Fever.\nThree days.", "Rest."]
    assert rows.histories == [PLAIN_TEXT] * 2
    with gzip.open(tmp_path / "more.txt.gz", "wb") as packed:
        packed.write(b"Tea.")
    rows = load_rows(str(tmp_path), question_column="input", answer_column="output")
    assert rows["output"] == ["Tea.", "Fever.\nThree days.", "Rest."]
    (tmp_path / "cards.jsonl").write_text('{"input": "Why?", "output": "So."}')
    rows = load_rows(str(tmp_path), question_column="input", answer_column="output")
    assert rows["output"] == ["So."]  # texts beside data describe them
    file.write_bytes(b"Gr\xf6\xdfe")
    with pytest.raises(DataError, match="the file is damaged"):
        load_rows(str(file), question_column="input", answer_column="output")
