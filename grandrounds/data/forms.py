"""The forms in which data sets hold questions and answers, told by their columns.

pairs           a column of questions and one of answers
alpaca          `instruction`, `input` and `output`: the first two make the question
conversations   a column of turns (see `conversations`)
preferences     `prompt`, `chosen` and `rejected`, for `train.objective = "dpo"` (see `pairs`)
text            one column of plain text, trained on as a whole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from grandrounds.data.conversations import COLUMNS as TURNS

INSTRUCTION = "instruction"
"""The column of Alpaca's format that FlowerTune's medical app drops."""

TEXT = "text"
"""The column of plain text that is found by its name."""

APART = f"{INSTRUCTION}?"
"""Asks for the instructions by themselves: blank where there is no such column. Then they are no
part of the question."""

REJECTED = "rejected?"
"""The column of rows that holds the rejected answers of preferences, whatever it is called in the
source."""

USUAL = ("input", "output")
"""The columns of questions and answers if none are named. Other forms are looked for only then."""

PROMPT, PREFERRED = "prompt", ("chosen", "rejected")
"""Columns of preferences; the prompt may be in the other two."""


@dataclass(frozen=True)
class Layout:
    """Where a source holds questions and answers."""

    form: str
    """`pairs`, `alpaca`, `conversations`, `preferences` or `text`."""
    question: tuple[str, ...]
    """Columns that make the question, joined by a space, or the one that holds turns."""
    answer: str
    """Column with the answer, or of plain text; empty for `conversations`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read."""
        instruction = (INSTRUCTION,) if self.question == ("input",) else ()
        both = PREFERRED if self.form == "preferences" else ()
        every = dict.fromkeys((*self.question, self.answer, *instruction, *both))
        return tuple(name for name in every if name)

    def without_instruction(self) -> Layout:
        """Return the layout with the instruction apart from the question."""
        rest = tuple(name for name in self.question if name != INSTRUCTION)
        return replace(self, question=rest) if rest else self

    @property
    def description(self) -> str:
        """The form in words; empty where it is what the configuration names."""
        named = " and ".join(self.question)
        joined = f"{named} make the question"
        apart = "the template shows the instruction apart"
        return {
            "alpaca": f"Alpaca triples: {joined if len(self.question) > 1 else apart}",
            "conversations": f"conversations in the column {named}",
            "text": f"plain text in the column {named}",
        }.get(self.form, "")


def layout_of(available: Sequence[str], question: str, answer: str) -> Layout:
    """Return where a source with these columns holds questions and answers.

    Parameters
    ----------
    question, answer : str
        `data.question-column` and `data.answer-column`. If they are the usual ones and not there,
        the columns of the other forms are looked for. Without a question column, the other one
        holds plain text.
    """
    if not question:
        return Layout("text", (answer,), answer)
    named = (question,) if question in available else named_in(question)
    parts = named or (question,)
    if len(parts) == 1 and parts[0] in available and answer not in available:
        return Layout("conversations", parts, "")
    if set(parts) <= set(available) or (question, answer) != USUAL:
        return Layout("pairs", parts, answer)
    for column in TURNS:
        if column in available:
            return Layout("conversations", (column,), "")
    if set(PREFERRED) <= set(available):
        return Layout("preferences", (PROMPT,), PREFERRED[0])
    for asked, answered in (("prompt", "completion"), (INSTRUCTION, "output")):
        if {asked, answered} <= set(available):
            return Layout("pairs", (asked,), answered)
    if TEXT in available and not {*parts, answer} & set(available):
        return Layout("text", (TEXT,), TEXT)
    return Layout("pairs", parts, answer)


def pairs(question: str, answer: str) -> Layout:
    """Return a column of questions and one of answers."""
    return Layout("pairs", (question,), answer)


def named_in(columns: str) -> tuple[str, ...]:
    """Return the columns named in a comma-separated list."""
    return tuple(name.strip() for name in columns.split(",") if name.strip())
