"""Rows read one by one: what a row says depends on that row and on the named columns alone.

Under a guarantee no record may decide how another one is read. So nothing is found out from the
rows here: columns are those that are named, and a record that cannot be used is left out, where a
run without a guarantee would name it and stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from grandrounds.data.conversations import (
    PLAIN_TEXT,
    Conversation,
    Unusable,
    conversation_of,
)
from grandrounds.data.files import Choice, RawRows, WrittenFloat
from grandrounds.data.forms import APART, INSTRUCTION, named_in
from grandrounds.data.rows import Rows


def columns_read_alone(columns: tuple[str, ...]) -> Choice:
    """Return which columns to read for those that are named, whatever the source has."""
    question, answer, *kept = columns
    asked = (INSTRUCTION if name == APART else name for name in kept)
    wanted = dict.fromkeys((*_parts(question), answer, *asked))
    return lambda _: tuple(name for name in wanted if name)


def rows_alone(raw: RawRows, columns: tuple[str, ...]) -> Rows:
    """Return rows of text under the columns that were asked for.

    A column that a row lacks is empty in it. Of a row without an answer column, or whose question
    is a list of turns, a conversation is read.

    Parameters
    ----------
    columns
        Of the question (empty: the answer's column holds plain text), of the answer (empty: the
        question's column holds conversations), then of labels, such as the unit.
    """
    question, answer, *kept = columns
    named = _parts(question)
    if APART in kept:
        named = tuple(name for name in named if name != INSTRUCTION) or named
    if not question:
        named = (answer,)
    parts = [_cells(raw, name) for name in named]
    answers = _cells(raw, answer)
    read = [
        _conversation(cells[-1]) if not answer else _pair(cells, said)
        for cells, said in zip(zip(*parts, strict=True), answers, strict=True)
    ]
    values: dict[str, list[Any]] = {
        question: [one.question for one in read],
        answer: [one.answer for one in read],
    }
    values |= {name: [_label(cell) for cell in _cells(raw, name)] for name in kept}
    if APART in kept:
        apart = _cells(raw, INSTRUCTION) if INSTRUCTION not in named else [None] * len(raw.places)
        values[APART] = [_text(cell) for cell in apart]
    histories = [PLAIN_TEXT if not question else one.before for one in read]
    return Rows(values, histories=histories)


def _parts(question: str) -> tuple[str, ...]:
    """Return the columns of a question; beside `input` also the instruction of Alpaca's format."""
    return (INSTRUCTION, question) if question == "input" else named_in(question)


def _cells(raw: RawRows, name: str) -> Sequence[Any]:
    return raw.values.get(name, [None] * len(raw.places))


def _conversation(cell: Any) -> Conversation:
    try:
        return conversation_of(cell if isinstance(cell, list) else ())
    except Unusable:
        return Conversation((), "", "")


def _pair(cells: Iterable[Any], said: Any) -> Conversation:
    asked = " ".join(text for text in map(_text, cells) if text.strip())
    return Conversation((), asked, _text(said))


def _text(cell: Any) -> str:
    """Return a cell as text; what is none is empty."""
    if isinstance(cell, WrittenFloat):
        return cell.text
    if isinstance(cell, bool) or (isinstance(cell, int | float) and cell == cell):
        return str(cell)
    if not isinstance(cell, str):
        return ""
    try:
        cell.encode()
    except UnicodeEncodeError:
        return ""
    return cell


def _label(cell: Any) -> str | None:
    return _text(cell) or None
