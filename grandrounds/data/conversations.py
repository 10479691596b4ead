"""Conversations as chat data sets hold them: OpenAI's `messages`, ShareGPT's `conversations`.

A conversation ends with the answer that is learned. Earlier answers are learned too, unless
`data.train-on` says otherwise; what the user, the system and the templates say never is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Turn = tuple[str, str]
"""A role, `system`, `user` or `assistant`, and what it says."""

PLAIN_TEXT: tuple[Turn, ...] = (("text", ""),)
"""What stands before the question of a row of plain text, whose question and answer are that text;
no conversation has such a turn."""

COLUMNS = ("messages", "conversations", "conversation")
"""Columns in which chat data sets keep their turns."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Role in a file → role."""

TOOLS = ("tool", "function", "ipython", "observation", "function_call", "tool_call")
"""Roles of tools: their turns would have to be rendered as each base expects them."""


class Unusable(ValueError):  # noqa: N818 - the reason why a row is left out, no error of the run
    """Why a conversation cannot be trained on; the text quotes nothing of it."""


@dataclass(frozen=True)
class Conversation:
    """Turns that end with a question and its answer."""

    before: tuple[Turn, ...]
    """What was said before the question."""
    question: str
    """The last question, stripped."""
    answer: str
    """The last answer, stripped."""


def is_conversation(value: Any) -> bool:
    """Whether a cell holds turns: a list of objects."""
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def conversation_of(turns: Sequence[Any]) -> Conversation:
    """Return a conversation.

    Turns of one role in a row become one, joined by a blank line, since most chat templates want
    roles that alternate. Turns of the user after the last answer are left out.

    Parameters
    ----------
    turns
        Objects with `role` and `content`, or `from` and `value`.

    Raises
    ------
    Unusable
        If there is no question with an answer, or a turn is not one of a system, a user or an
        assistant.
    """
    said = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    joined = [
        (role, "\n\n".join(content for _, content in group))
        for role, group in groupby(said, key=lambda turn: turn[0])
    ]
    while joined and joined[-1][0] != "assistant":
        joined.pop()
    if not joined:
        raise Unusable("no answer of the assistant" if said else "no turns")
    roles = [role for role, _ in joined]
    if "system" in roles[1:]:
        raise Unusable("a system prompt after the first turn")
    if roles[roles[0] == "system"] != "user":
        raise Unusable("the assistant speaks first")
    before, (_, question), (_, answer) = joined[:-2], joined[-2], joined[-1]
    return Conversation(tuple(before), question, answer)


def _turn(turn: Any, number: int) -> Turn:
    """Return a turn with its role and its stripped content."""
    if not isinstance(turn, Mapping):
        raise Unusable(f"turn {number} is no object")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str):
        raise Unusable(f"turn {number} has no role ('role' or 'from')")
    if name.lower() in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable(f"turn {number} uses a tool")
    role = ROLES.get(name.lower())
    if role is None:
        raise Unusable(f"turn {number} has the unknown role {name[:20]!r}")
    content = _content(turn.get("content", turn.get("value")), number)
    if not content:
        raise Unusable(f"turn {number} is empty")
    return role, content


def _content(value: Any, number: int) -> str:
    """Return the text of a turn; several parts of text are joined as they stand."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(parts):
            raise Unusable(f"turn {number} holds more than text")
        value = "".join(texts)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"turn {number} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"turn {number} has an unpaired surrogate, which is no text") from error
    return value.strip()
