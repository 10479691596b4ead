"""Under a guarantee a row says the same whatever the other rows hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grandrounds.data.sources import load_rows
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.errors import ConfigError
from tests.data.test_chat import CONVERSATION, PLAIN

ROWS: list[dict[str, Any]] = [
    {"input": "Fever?", "output": "Rest.", "patient": 17},
    {"input": "Cough?", "output": "Tea.", "patient": "18", "instruction": "Answer."},
]
ODD: dict[str, dict[str, Any]] = {
    "another instruction": {"instruction": "Tell.", "input": "Why?", "output": "So."},
    "no text": {"input": ["Why?"], "output": {"text": "So."}},
    "half a surrogate": {"input": "Why\ud800?", "output": "So."},
    "another form": {"prompt": "Why?", "completion": "So."},
    "turns": {"messages": [{"role": "user", "content": "Why?"}]},
    "another type of label": {"input": "Why?", "output": "So.", "patient": 17.5},
    "nothing": {},
}


def said(tmp_path: Path, rows: list[dict[str, Any]], **columns: str) -> list[Any]:
    named = {"question_column": "input", "answer_column": "output"} | columns
    (path := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(str(path), keep_columns=("patient",), alone=True, **named)
    values = [read[name] for name in (*named.values(), "patient")]
    return list(zip(*values, read.histories, strict=True))


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_record_changes_no_other_one(tmp_path: Path, odd: dict[str, Any]) -> None:
    plain = said(tmp_path, ROWS)
    assert plain == [("Fever?", "Rest.", "17", ()), ("Answer. Cough?", "Tea.", "18", ())]
    assert said(tmp_path, [odd, *ROWS])[1:] == plain
    assert said(tmp_path, [*ROWS, odd])[:2] == plain


def test_conversations_are_read_where_no_column_of_answers_is_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "Rest."}]
    rows = [{"messages": turns}, {"messages": "Fever?"}, {"messages": turns[:1]}]
    found = said(tmp_path, rows, question_column="messages", answer_column="")
    assert [row[:2] for row in found] == [("Fever?", "Rest."), ("", ""), ("", "")]


def test_a_record_without_room_in_the_prompt_is_left_out_by_itself(tiny_base: Path) -> None:
    """One conversation among them made a site refuse a prompt that the server chose."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    found = tokenize_examples([CONVERSATION, PLAIN], tokenizer, "alpaca", 500, alone=True)
    [plain] = tokenize_examples([PLAIN], tokenizer, "alpaca", 500).examples
    assert found.examples == (plain,)
    assert (found.unlearnable, found.positions) == (1, (1,))


def test_a_record_that_the_template_refuses_is_left_out_by_itself(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    refused = replace(PLAIN, before=(("system", "Be brief."),))
    found = tokenize_examples([refused, CONVERSATION], tokenizer, "chat", 500, alone=True)
    assert (len(found.examples), found.unlearnable, found.positions) == (1, 1, (1,))
    with pytest.raises(ConfigError, match="cannot render a conversation of system, user"):
        tokenize_examples([refused, CONVERSATION], tokenizer, "chat", 500)
