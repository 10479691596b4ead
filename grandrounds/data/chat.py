"""What a tokenizer's chat template renders around a question and its answer.

The trained text is what the template renders for the finished conversation: the generation prompt,
the answer as it stands in context, and the template's own end of turn, which need not be the
tokenizer's end-of-sequence (Gemma's is `<end_of_turn>`). Where a template renders a finished turn
without the generation prompt (one that leaves thinking out), prompt, answer and end of turn are put
together, since that is what the model continues in use.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import eq
from typing import Any

from grandrounds.errors import ConfigError, first_line

QUESTION, ANSWER = "Which drug is it?", "Zyx seven"
"""Stand in for a question and its answer; no template changes their characters."""

SYSTEM_PROMPT = "Zyx will help."
"""Stands in for a system prompt; no template says it of itself."""

NOT_A_PREFIX = (
    "finished conversations do not begin with its generation prompt (a thinking template): trained "
    "on are generation prompt, answer and end of turn"
)
"""What is said of a template that renders a finished turn differently."""


@dataclass(frozen=True)
class ChatFormat:
    """The constant text of a chat template's answer, and its end of turn."""

    prompt: str
    """The rendered text before the answer to `QUESTION`."""
    lead: str
    """Text between the generation prompt and the answer, such as an empty thinking block."""
    tail: str
    """The rendered text after an answer."""
    opened: str
    """End of the generation prompt that finished conversations leave out, such as `<think>`."""
    end: tuple[int, ...]
    """Tokens that end the answer: those of the template up to its first special one, else
    end-of-sequence."""
    trims: tuple[str, str]
    """White space that the template removes before and after an answer."""
    is_prefix: bool
    """Whether a finished conversation begins with the generation prompt."""

    def answer_texts(self, tokenizer: Any, answers: Sequence[str]) -> list[str]:
        """Return the text of answers as it follows the prompt, without the end of turn.

        Raises
        ------
        ConfigError
            If an answer is rendered after another text than the generation prompt.
        """
        return [self._answer_text(tokenizer, answer) for answer in answers]

    def answer_ids(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of `answer_texts` in the context of the prompt."""
        return in_context(tokenizer, self.prompt, texts)

    def _answer_text(self, tokenizer: Any, answer: str) -> str:
        """Return an answer as it follows the prompt: templates take out or move its reasoning."""
        before, after = self.trims
        plain = self.lead + answer.lstrip(before).rstrip(after)
        if not self.is_prefix:
            return self._continued(plain)
        if not answer.strip():
            return plain
        whole = rendered(tokenizer, [("user", QUESTION), ("assistant", answer)], answering=False)
        if whole == self.prompt + plain + self.tail:
            return plain
        if not whole.startswith(self.prompt) or not whole.endswith(self.tail):
            raise ConfigError(
                f"An answer of {len(answer)} characters is not rendered after the generation "
                "prompt of the tokenizer's chat template, as happens to reasoning where "
                "data.template-options turns thinking off. Change the options, take the reasoning "
                'out of the answers, or use data.prompt-template = "alpaca".'
            )
        return whole.removeprefix(self.prompt).removesuffix(self.tail)

    def _continued(self, answer: str) -> str:
        """Return an answer without the beginning that the generation prompt has already."""
        mark = self.opened.strip()
        if not mark or not answer.lstrip().startswith(mark):
            return answer
        if answer.startswith(self.opened):
            return answer.removeprefix(self.opened)
        return answer.lstrip().removeprefix(mark).lstrip()


def in_context(tokenizer: Any, before: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts as they follow another text, such as a prompt."""
    prompt: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer([before + text for text in texts], add_special_tokens=False)
    found = []
    for text, ids in zip(texts, whole["input_ids"], strict=True):
        is_prefix = list(ids[: len(prompt)]) == prompt
        # else its first token would join the prompt's last one
        found.append(list(ids[len(prompt) :]) if is_prefix else apart(tokenizer, [text])[0])
    return found


def apart(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts that follow something else, each tokenised by itself."""
    if tokenizer.tokenize("a")[0].startswith("▁"):
        # SentencePiece prepends a space itself; ours would be a second one.
        texts = [text.removeprefix(" ") for text in texts]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def put_first(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text."""
    alone = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:at] for at in starts if whole[at : at + len(alone)] == alone), [])


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], *, answering: bool) -> str:
    """Return turns of (role, content) as the template renders them.

    Parameters
    ----------
    answering : bool
        Whether the prompt of the next answer follows.

    Raises
    ------
    ConfigError
        If the template refuses or cannot render them.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        )
    except Exception as error:  # a template's expressions raise whatever Python's do
        kinds = ", ".join(role for role, _ in turns)
        raise ConfigError(
            f"The tokenizer's chat template cannot render a conversation of {kinds}: "
            f"{first_line(error)}. Use another template of the model (data.template-options sets "
            'what it may need), or data.prompt-template = "alpaca".'
        ) from error


def says_system_prompt(tokenizer: Any) -> bool:
    """Whether a chat template renders a system prompt."""
    turns = [("system", SYSTEM_PROMPT), ("user", QUESTION)]
    try:
        return SYSTEM_PROMPT in rendered(tokenizer, turns, answering=True)
    except ConfigError:  # as templates do that have no such role
        return False


@lru_cache(maxsize=4)
def chat_format(tokenizer: Any) -> ChatFormat:
    """Return the format of a tokenizer's chat template.

    Raises
    ------
    ConfigError
        If it does not render answers.
    """
    asked = [("user", QUESTION)]
    prompt = rendered(tokenizer, asked, answering=True)
    whole = rendered(tokenizer, [*asked, ("assistant", ANSWER)], answering=False)
    if ANSWER not in whole:
        raise ConfigError(
            "The tokenizer's chat template does not render the assistant's answer, so there is "
            'nothing to train on: use data.prompt-template = "alpaca".'
        )
    is_prefix = whole.startswith(prompt)
    rest = whole.removeprefix(prompt) if is_prefix else whole[whole.rindex(ANSWER) :]
    lead, _, tail = rest.partition(ANSWER)
    same = sum(takewhile(bool, map(eq, prompt, whole)))

    def trimmed(before: str, after: str) -> bool:
        turns = [*asked, ("assistant", f"{before}{ANSWER}{after}")]
        return rendered(tokenizer, turns, answering=False) == whole

    return ChatFormat(
        prompt=prompt,
        lead=lead,
        tail=tail,
        opened="" if is_prefix else prompt[same:],
        end=_end_of_turn(tokenizer, tail),
        trims=(
            "".join(blank for blank in string.whitespace if trimmed(blank, "")),
            "".join(blank for blank in string.whitespace if trimmed("", blank)),
        ),
        is_prefix=is_prefix,
    )


def _end_of_turn(tokenizer: Any, tail: str) -> tuple[int, ...]:
    """Return the tokens of the text after an answer, up to the first special one."""
    ids, is_special = until_special(tokenizer, tail)
    return ids if is_special else (tokenizer.eos_token_id,)


def until_special(tokenizer: Any, tail: str) -> tuple[tuple[int, ...], bool]:
    """Return the tokens of a text after an answer up to its first special one, if it has one."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    before = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    ids = tokenizer(ANSWER + tail, add_special_tokens=False)["input_ids"][len(before) :]
    for count, token in enumerate(ids, 1):
        if token in special:
            return tuple(ids[:count]), True
    return tuple(ids), False
