"""What the rows of a source say: questions, answers and labels, in the form that is found."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.data.conversations import (
    COLUMNS as TURNS,
)
from grandrounds.data.conversations import (
    PLAIN_TEXT,
    Conversation,
    Turn,
    Unusable,
    conversation_of,
)
from grandrounds.data.files import PEEKED_RECORDS, Choice, RawRows, WrittenFloat
from grandrounds.data.forms import (
    APART,
    INSTRUCTION,
    PREFERRED,
    PROMPT,
    Layout,
    layout_of,
    pairs,
)
from grandrounds.data.places import SOURCE_KEY
from grandrounds.data.preferences import preferences_of
from grandrounds.errors import DataError, nearest

_INT64_END = 1 << 63


@dataclass(frozen=True)
class Read:
    """The rows of a source as text, in the form that was found."""

    values: dict[str, list[Any]]
    """Questions, answers and labels, under the columns that were asked for."""
    histories: list[tuple[Turn, ...]]
    """What was said before each question; empty if the source holds no conversations."""
    form: str
    """The form in words; empty for a column of questions and one of answers."""
    left_out: tuple[str, ...]
    """Conversations that cannot be trained on, each with its place and the reason."""
    columns: frozenset[str]
    """The columns of the source that they come from."""


def as_read(raw: RawRows, source: str, columns: tuple[str, ...]) -> Read:
    """Return the columns as `load_rows` describes them: two of text, then labels.

    A conversation that cannot be trained on has neither question nor answer.

    Raises
    ------
    DataError
        If there are no rows, a column is missing, a value is not text, or a label is a number in
        one row and the same as text in another.
    """
    layout = settled_layout(raw, source, columns)
    if layout.form == "preferences":
        raise no_answers(raw, source, f": {preferences_of(raw).counted}")
    (question, answer), kept = columns[:2], columns[2:]
    texts = texts_of(raw, source, layout)
    values: dict[str, list[Any]] = {question: texts.questions, answer: texts.answers}
    labels = {
        name: labels_of(raw.values[name], f"{source}, column {name!r}")
        for name in kept
        if name not in (question, answer, APART)
    }
    if APART in columns:
        labels[APART] = instructions_of(raw, source, columns, layout)
    used = columns_used(layout, columns)
    return Read(values | labels, texts.histories, layout.description, texts.left_out, used)


def columns_used(layout: Layout, columns: tuple[str, ...]) -> frozenset[str]:
    """Return the columns of a source whose content reaches somebody."""
    asked = frozenset((*layout.question, layout.answer, *columns[2:]))
    return asked | {INSTRUCTION} if APART in columns else asked


@dataclass(frozen=True)
class Texts:
    """What rows say, in their order."""

    questions: list[str]
    answers: list[str]
    histories: list[tuple[Turn, ...]]
    """What was said before each question; empty if the source holds no conversations."""
    left_out: tuple[str, ...]
    """Conversations that cannot be trained on, each with its place and the reason."""


def settled_layout(raw: RawRows, source: str, columns: tuple[str, ...]) -> Layout:
    """Return where questions and answers are, as the columns and the values show.

    Raises
    ------
    DataError
        If there are no rows, or a column is missing.
    """
    if not raw.places:
        raise DataError(
            f"{source}: the data source has no rows; at least one question with its answer is "
            f"needed. Choose another {SOURCE_KEY}."
        )
    (question, answer), kept = columns[:2], tuple(n for n in columns[2:] if n != APART)
    layout = _settled(layout_of(raw.available, question, answer), raw, source, columns)
    if question == answer and layout.form == "pairs":
        raise DataError(
            f"{source}: data.question-column and data.answer-column are both {answer!r}. For plain "
            "text, trained on as a whole, leave the first one empty; else name two columns."
        )
    if APART in columns:
        layout = layout.without_instruction()
    if layout.form == "preferences":
        return layout
    answered = {layout.answer: "data.answer-column"} if layout.answer else {}
    keys = dict.fromkeys(layout.question, "data.question-column") | answered
    _check_columns(raw.available, source, keys | dict.fromkeys(kept, "data.partition-by"))
    if late := [name for name in (*keys, *kept) if name not in raw.values]:
        raise DataError(
            f"{source}: the column {late[0]!r} is in none of the first {PEEKED_RECORDS} rows and "
            "in later ones. The rows of a source need the same columns: make two files of it."
        )
    return layout


def no_answers(raw: RawRows, source: str, counted: str = "") -> DataError:
    """Return the error for preferences, with their number where it is known."""
    if any(isinstance(cell, list) for cell in raw.values[PREFERRED[0]]):
        chosen = "data.question-column=chosen"
    elif PROMPT in raw.available:
        chosen = "data.question-column=prompt data.answer-column=chosen"
    else:
        chosen = ""
    advice = (
        f"For the chosen ones write {chosen}."
        if chosen
        else "For the chosen ones put their questions into a column of their own."
    )
    return DataError(
        f"{source}: these are preferences (prompt, chosen, rejected){counted}. A run trains on one "
        f'answer for each question, or with train.objective = "dpo" on both. {advice}'
    )


def texts_of(raw: RawRows, source: str, layout: Layout) -> Texts:
    """Return questions and answers; raise `DataError` if a value is not text."""
    if layout.form == "conversations":
        return Texts(*_conversations(raw, source, layout))
    questions = _joined(raw, source, layout.question)
    same = layout.question == (layout.answer,)
    answers = questions if same else _texts(raw, source, layout.answer, "data.answer-column")
    histories = [PLAIN_TEXT] * len(answers) if layout.form == "text" else []
    return Texts(questions, answers, histories, ())


def instructions_of(
    raw: RawRows, source: str, columns: tuple[str, ...], layout: Layout
) -> list[str]:
    """Return the instructions by themselves; blank where they are part of the question or absent.

    Raises
    ------
    DataError
        If one is not text.
    """
    used = (*layout.question, layout.answer, *columns[2:])
    if INSTRUCTION in used or INSTRUCTION not in raw.values:
        return [""] * len(raw.places)
    return _texts(raw, source, INSTRUCTION)


def columns_read(columns: tuple[str, ...]) -> Choice:
    """Return which columns to read of a source, for those that are asked for."""
    question, answer, *kept = columns

    def choose(available: Sequence[str]) -> tuple[str, ...]:
        names = dict.fromkeys((*layout_of(available, question, answer).columns, *kept))
        if APART in names:
            del names[APART]
            names |= dict.fromkeys([INSTRUCTION] * (INSTRUCTION in available))
        return tuple(names)

    return choose


def _conversations(
    raw: RawRows, source: str, layout: Layout
) -> tuple[list[str], list[str], list[tuple[Turn, ...]], tuple[str, ...]]:
    """Return questions, answers and histories of conversations, and those that have none.

    Raises
    ------
    DataError
        If the cells are not turns.
    """
    questions, answers, histories, left_out = [], [], [], []
    column = layout.question[0]
    for row, value in enumerate(raw.values[column]):
        if value is not None and not isinstance(value, list):
            raise DataError(
                f"{source}, {raw.where(row)}, column {column!r}: the value is {described(value)}, "
                "not a list of turns with role and content, as in other rows. Correct the row."
            )
        try:
            found = conversation_of(value or ())
        except Unusable as reason:
            left_out.append(f"{raw.where(row)}: {reason}")
            found = Conversation((), "", "")
        questions.append(found.question)
        answers.append(found.answer)
        histories.append(found.before)
    return questions, answers, histories, tuple(left_out)


def _joined(raw: RawRows, source: str, parts: Sequence[str]) -> list[str]:
    """Return the text of one column, or of several joined by a space."""
    texts = [_texts(raw, source, part) for part in parts]
    if len(texts) == 1:
        return texts[0]
    return [" ".join(text for text in row if text.strip()) for row in zip(*texts, strict=True)]


def _settled(layout: Layout, raw: RawRows, source: str, columns: tuple[str, ...]) -> Layout:
    """Return the layout that the values show: turns are lists, and instructions may differ.

    FlowerTune's medical data have one instruction for all rows, which it leaves out.
    """
    if layout.form == "conversations":
        column = layout.question[0]
        values = raw.values.get(column, ())
        if any(isinstance(value, list) for value in values):
            return layout
        if column in TURNS and any(isinstance(value, str) for value in values):
            raise DataError(
                f"{source}: the column {column!r} holds text, not lists of turns with role and "
                "content. Write the turns as JSON themselves, not as JSON in a text; a .csv or "
                ".tsv file cannot hold them."
            )
        return pairs(*columns[:2])
    if layout.question != ("input",) or INSTRUCTION in columns:
        return layout
    texts = raw.values.get(INSTRUCTION, [])
    different = {text.strip() for text in texts if isinstance(text, str) and text.strip()}
    if len(different) < 2:
        return layout
    return Layout("alpaca", (INSTRUCTION, "input"), layout.answer)


COLUMN_NAMES = {
    "data.question-column": ("question", "prompt", "instruction", "input", "query", "front", "q"),
    "data.answer-column": ("answer", "response", "completion", "output", "target", "back", "a"),
    "data.partition-by": ("site", "hospital", "ward", "client", "center", "centre", "department"),
}
"""Key of a column → what files usually call it, the likeliest first."""

_OF_TEXTS = ("data.question-column", "data.answer-column")
"""Keys with a column of their own. Others are named by partitioning, units and subgroups."""


def _check_columns(available: Sequence[str], source: str, wanted: Mapping[str, str]) -> None:
    """Raise one `DataError` for all columns that are missing or occur more than once.

    Parameters
    ----------
    wanted
        Column → key that names it.
    """
    if not available:
        raise DataError(f"{source}: it has no columns: its rows, if there are any, are empty.")
    if len(available) == 1 and (other := next((s for s in ";|\t" if s in available[0]), "")):
        raise DataError(
            f"{source}: its one column is named {available[0]!r}, so that its values are separated "
            f"by {other!r}, it seems. Values are separated by commas in .csv files and by tabs in "
            ".tsv files: save it so."
        )
    faults, advice = [], []
    for name, key in wanted.items():
        count = available.count(name)
        if count == 1:
            continue
        fault = f"there are {count} columns named" if count else "there is no column"
        faults.append(f"{fault} {name!r}")
        advice.append(_column_advice(key, name, [one for one in available if one not in wanted]))
    if faults:
        raise DataError(
            f"{source}: {' and '.join(faults)}; the columns are: {', '.join(available)}."
            f"{''.join(advice)}"
        )


def _column_advice(key: str, name: str, available: Sequence[str]) -> str:
    """Return which column a key should name: the one of its meaning, else of nearly its name."""
    lower = {one.strip().lower(): one for one in reversed(available)}
    usual = next((lower[one] for one in COLUMN_NAMES[key] if one in lower), None)
    if not usual or nearest(name, available):
        where = key if key in _OF_TEXTS else "the key that names it"
        return f"{nearest(name, available)} Set {where} to a column that occurs once."
    return f" Did you mean {usual!r}? Write {key}={usual}."


def _texts(raw: RawRows, source: str, name: str, key: str = "data.question-column") -> list[str]:
    """Return a column, which a key names, as text; missing values become empty strings."""
    return [
        value
        if isinstance(value, str) and value.isascii()
        else _text(value, f"{source}, {raw.where(row)}, column {name!r}", key)
        for row, value in enumerate(raw.values[name])
    ]


def _text(value: Any, where: str, key: str) -> str:
    """Return one value as text; `where` starts the message of an error."""
    if value is None or value != value:  # NaN is the only number that differs from itself
        return ""
    if isinstance(value, numbers.Number):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the value is {described(value)}, but only text, numbers and missing values "
            f"are supported. {_as_text(value)}, or set {key} to another column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is an unpaired surrogate and not valid text. "
            "Remove it from the source."
        ) from error
    return value


def _as_text(value: Any) -> str:
    """Return how to write a value as text."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return "If these are turns of a conversation, name the column `messages`"
    if isinstance(value, list):
        alone = len(value) == 1
        return "Write its text without the list" if alone else "Write its texts as one, or as rows"
    if isinstance(value, Mapping):
        return "Write the text of one of its keys as a column of its own"
    return "Write it as text"


def described(value: Any) -> str:
    """Return what a value that is no text is: its type, length and keys, nothing of its content."""
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of length {len(value)}"
    if isinstance(value, Mapping):
        keys = ", ".join(str(key)[:30] for key in list(value)[:6])
        return f"an object with the keys {keys}" if value else "an empty object"
    return f"of type {type(value).__name__}"


def labels_of(values: list[Any], where: str) -> list[Any]:
    """Return a further column as all integers or all text; missing values are None."""
    labels = [
        None
        if value is None or value != value or (isinstance(value, str) and not value.strip())
        else value
        for value in values
    ]
    if all(
        label is None or (type(label) is int and -_INT64_END <= label < _INT64_END)
        for label in labels
    ):
        return labels
    texts = [
        None if label is None else label.text if isinstance(label, WrittenFloat) else str(label)
        for label in labels
    ]
    is_text: dict[str, bool] = {}
    for label, text in zip(labels, texts, strict=True):
        if text is not None and is_text.setdefault(text, type(label) is str) != (
            type(label) is str
        ):
            raise DataError(
                f"{where}: {text} is text in one row and not in another, so that it is unclear "
                "whether both are the same. Write all of them as text, or none."
            )
    return texts
