"""Preferences: a prompt, the answer that was chosen, and the one that was rejected.

Read as people publish them: three columns of text; `chosen` and `rejected` as lists of turns, with
or without what precedes the answer; and without a prompt, where both begin with the same turns.
`train.objective = "dpo"` trains on them; see `pairs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.data.conversations import Conversation, Turn, Unusable, conversation_of
from grandrounds.data.files import RawRows
from grandrounds.data.forms import PREFERRED, PROMPT

_SPOKEN = re.compile(r"\n\n(Human|Assistant):")
"""How a dialogue without turns names who speaks."""

_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt. No text is empty, and the answers differ."""

    before: tuple[Turn, ...]
    """What was said before the question."""
    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Preferences:
    """The preferences of a source, in its order."""

    pairs: tuple[Preference, ...]
    left_out: tuple[str, ...]
    """Rows that hold none, each with its place and the reason; nothing of their text is quoted."""

    @property
    def counted(self) -> str:
        """The counts in words."""
        pairs, left_out = len(self.pairs), len(self.left_out)
        found = f"{pairs:,} pair{'s' * (pairs != 1)} of answers"
        if not left_out:
            return found
        lack = f"{left_out:,} {'have' if left_out > 1 else 'has'} none"
        return f"{found} in {pairs + left_out:,} rows; {lack}, the first: {self.left_out[0]}"


def columns_of_preferences(available: Sequence[str]) -> tuple[str, ...]:
    """Return which columns to read of a source."""
    return tuple(name for name in (PROMPT, *PREFERRED) if name in available)


def preferences_of(raw: RawRows) -> Preferences:
    """Return the preferences in the rows of a source that has the columns `PREFERRED`."""
    each = list(each_preference(raw))
    pairs = tuple(found for found in each if isinstance(found, Preference))
    return Preferences(pairs, tuple(why for why in each if isinstance(why, str)))


def each_preference(
    raw: RawRows, columns: tuple[str, str, str] = (PROMPT, *PREFERRED)
) -> Iterator[Preference | str]:
    """Yield the preference of each row, or why it holds none, with its place.

    Parameters
    ----------
    columns
        Of the prompt, which a source may lack, the chosen and the rejected answer.
    """
    prompt, *answers = columns
    none = [None] * len(raw.places)
    cells = raw.values.get(prompt, none), *(raw.values[name] for name in answers)
    for row, (asked, chosen, rejected) in enumerate(zip(*cells, strict=True)):
        try:
            yield _preference(asked, chosen, rejected)
        except Unusable as reason:
            yield f"{raw.where(row)}: {reason}"


def _preference(prompt: Any, chosen: Any, rejected: Any) -> Preference:
    """Return what a row prefers; raise `Unusable` if it holds no two answers to one prompt."""
    one, other = (
        _conversation(prompt, cell, name)
        for name, cell in zip(PREFERRED, (chosen, rejected), strict=True)
    )
    if (one.before, one.question) != (other.before, other.question):
        raise Unusable("chosen and rejected answer different prompts")
    if one.answer == other.answer:
        raise Unusable("chosen and rejected are equal")
    return Preference(one.before, one.question, one.answer, other.answer)


def _conversation(prompt: Any, cell: Any, name: str) -> Conversation:
    """Return the prompt with one of its answers."""
    if cell is None or cell in ("", []) or (isinstance(cell, str) and not cell.strip()):
        raise Unusable(f"{name} is empty")
    turns = _turns(cell, name, "assistant")
    if not any(_asks(turn) for turn in turns):
        if prompt is None or prompt == []:
            raise Unusable("there is no prompt")
        turns = [*_turns(prompt, PROMPT, "user"), *turns]
    elif prompt is not None and not _begins(turns, _turns(prompt, PROMPT, "user")):
        raise Unusable(f"the prompt is not that of {name}")
    try:
        return conversation_of(turns)
    except Unusable as reason:
        raise Unusable(f"{name}: {reason}") from reason


def _turns(cell: Any, name: str, role: str) -> list[Any]:
    """Return the turns in a cell, which may be one text."""
    if isinstance(cell, list):
        return cell
    if not isinstance(cell, str):
        raise Unusable(f"{name} is of type {type(cell).__name__}, neither text nor a list of turns")
    spoken = list(_spoken(cell))
    return spoken or [{"role": role, "content": cell}]


def _spoken(text: str) -> Iterator[dict[str, str]]:
    """Yield the turns of a dialogue that begins with who speaks."""
    begins, *parts = _SPOKEN.split(text)
    if begins.strip():
        return
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if said.strip():
            yield {"role": _ROLES[speaker], "content": said}


def _asks(turn: Any) -> bool:
    """Whether a turn is one of the user; anything else is told by `conversation_of`."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return role in ("user", "human")


def _begins(turns: Sequence[Any], prompt: Sequence[Any]) -> bool:
    """Whether turns say what a prompt asks: begin with it, or have it as one of their questions."""
    said = [_said(turn) for turn in turns]
    asked = [_said(turn) for turn in prompt]
    return said[: len(asked)] == asked or (len(asked) == 1 and asked[0] in said)


def _said(turn: Any) -> str:
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
    return str(content).strip()
