"""Tokenises prompt and answer separately, so that the loss mask is exact for any tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grandrounds.data.chat import apart, chat_format, put_first, rendered
from grandrounds.data.conversations import PLAIN_TEXT, Turn
from grandrounds.data.own_prompt import is_own, own_prompt
from grandrounds.data.prompts import build_prompt, response_text
from grandrounds.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from grandrounds.data.examples import Example

ANSWERS, LAST = "answers", "last"
"""Values of `data.train-on`."""

IGNORED_LABEL = -100
"""Label of every position that the loss ignores."""

LARGEST_TAIL = 16
"""A row's tail is shorter than a 16th of the row."""


@dataclass(frozen=True)
class TokenizedExample:
    """One example as input to the model."""

    input_ids: tuple[int, ...]
    """Prompt, answer and the tokens that end it."""
    prompt_tokens: int
    """Number of prompt tokens at the start of `input_ids`; the loss ignores these, except
    `earlier`."""
    earlier: tuple[tuple[int, int], ...] = ()
    """Start and stop of earlier answers in the prompt that are learned too, in order."""
    rejected: tuple[int, ...] = ()
    """Of a preference, the rejected answer after the same prompt, and the tokens that end it; the
    chosen one is in `input_ids`. Empty for any other example."""

    @property
    def answers(self) -> tuple[TokenizedExample, ...]:
        """What goes through the model: the example itself, or each answer of a preference, the
        chosen one first."""
        if not self.rejected:
            return (self,)
        prompt = self.input_ids[: self.prompt_tokens]
        return (
            TokenizedExample(self.input_ids, self.prompt_tokens),
            TokenizedExample((*prompt, *self.rejected), self.prompt_tokens),
        )

    @property
    def tokens(self) -> int:
        """Number of tokens that go through the model."""
        return sum(len(answer.input_ids) for answer in self.answers)

    @property
    def terms(self) -> int:
        """Number of terms of the loss: learned tokens, or 1 for a preference."""
        return 1 if self.rejected else self.answer_tokens

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that are learned."""
        earlier = sum(stop - start for start, stop in self.earlier)
        return len(self.input_ids) - self.prompt_tokens + earlier


@dataclass(frozen=True)
class TokenizedExamples:
    """A site's examples, and how many the sequence length affected."""

    examples: tuple[TokenizedExample, ...]
    """Examples with at least one answer token."""
    truncated: int
    """Examples with a truncated answer, and so without its end."""
    unlearnable: int
    """Examples dropped because the prompt fills the sequence."""
    shortened: int = 0
    """Examples of which the chat template leaves out a part of the answer, such as reasoning."""
    unlearned: int = 0
    """Earlier answers that the template renders differently once the conversation goes on; they
    are not learned."""
    positions: tuple[int, ...] = ()
    """Position of each example among those given."""


def prompt_token_ids(tokenizer: Any, template: str, questions: Sequence[str]) -> list[list[int]]:
    """Return the prompts' tokens, with beginning-of-sequence where the tokenizer adds one.

    A chat template contains its own special tokens, so none are added.
    """
    if not questions:
        return []
    if is_own(template):
        return own_prompt(template).prompt_ids(tokenizer, [(one, "", "") for one in questions])
    texts = [build_prompt(template, question, tokenizer) for question in questions]
    ids = tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]
    eos = tokenizer.eos_token_id
    return [i[:-1] if template != "chat" and i and i[-1] == eos else i for i in ids]


def conversation_token_ids(
    tokenizer: Any, template: str, conversations: Sequence[Sequence[Turn]]
) -> list[list[int]]:
    """Return the tokens before the next answer of conversations that end with a question.

    Raises
    ------
    DataError
        If one has several turns, and the template has room for one question.
    """
    longer = sum(len(turns) > 1 for turns in conversations)
    if not longer:
        return prompt_token_ids(tokenizer, template, [turns[0][1] for turns in conversations])
    if is_own(template):
        systems = [system_of(turns[:-1], template) for turns in conversations]
        check_room(template, systems.count(None), len(conversations))
        asked = [
            (turns[-1][1], "", system or "")
            for turns, system in zip(conversations, systems, strict=True)
        ]
        return own_prompt(template).prompt_ids(tokenizer, asked)
    check_room(template, longer, len(conversations))
    texts = [rendered(tokenizer, turns, answering=True) for turns in conversations]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def system_of(before: Sequence[Turn], template: str) -> str | None:
    """Return the system prompt before a question; None if a template of one's own lacks the room.

    It has room for a system prompt where it reads `system`, and for no earlier turns.
    """
    if not before:
        return ""
    if len(before) > 1 or before[0][0] != "system" or "system" not in own_prompt(template).names:
        return None
    return before[0][1]


def check_room(template: str, conversations: int, examples: int, with_system_only: int = 0) -> None:
    """Raise `DataError` if a prompt template has no room for conversations.

    Parameters
    ----------
    with_system_only : int
        How many of them have a system prompt before the question and nothing else.
    """
    if is_own(template) and "system" in own_prompt(template).names:
        conversations -= with_system_only
    if conversations and template != "chat":
        which = "the file given" if is_own(template) else f'"{template}"'
        raise DataError(
            f"{conversations:,} of {examples:,} examples are conversations of several turns or "
            f"have a system prompt, and data.prompt-template = {which} has room for one question: "
            'set data.prompt-template = "chat", with a base that has a chat template.'
        )


def is_text(example: Example) -> bool:
    """Whether an example is plain text."""
    return example.before == PLAIN_TEXT


def check_text(template: str, texts: int, examples: int) -> None:
    """Raise `DataError` if plain text is to be asked in a prompt, or questions without one."""
    if texts and template != "text":
        raise DataError(
            f"{texts:,} of {examples:,} examples are plain text, without question: set "
            'data.prompt-template = "text", which trains on all of a text without a prompt; or '
            "name the columns in data.question-column and data.answer-column."
        )
    if texts < examples and template == "text":
        raise DataError(
            f"{examples - texts:,} of {examples:,} examples have a question, and "
            'data.prompt-template = "text" trains on plain text, without a prompt: set "alpaca" or '
            '"chat", or name the column of texts in data.answer-column and leave '
            'data.question-column empty ("").'
        )


def answer_token_ids(tokenizer: Any, template: str, answers: Sequence[str]) -> list[list[int]]:
    """Return the answers' tokens as they follow a prompt, without their end."""
    if not answers:
        return []
    if is_own(template):
        return own_prompt(template).answer_ids(tokenizer, answers)
    if template == "chat":
        form = chat_format(tokenizer)
        return form.answer_ids(tokenizer, form.answer_texts(tokenizer, answers))
    return apart(tokenizer, [response_text(template, answer) for answer in answers])


def end_token_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """Return the tokens that end an answer: the template's end of turn, or end-of-sequence."""
    if is_own(template):
        return own_prompt(template).end_ids(tokenizer)
    return chat_format(tokenizer).end if template == "chat" else (tokenizer.eos_token_id,)


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    seq_length: int,
    train_on: str = ANSWERS,
    alone: bool = False,
) -> TokenizedExamples:
    """Tokenise a site's examples.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer with an end-of-sequence token.
    template : str
        A prompt template of `grandrounds.data.prompts`.
    seq_length : int
        Maximum sequence length in tokens, prompt plus answer; only answers are truncated, and
        conversations of which an earlier answer is learned.
    train_on : str
        `answers`: every answer of a conversation; `last`: its last one.
    alone : bool
        Whether an example that the template cannot render is left out as unlearnable, so that it
        decides nothing about the others.

    Raises
    ------
    DataError
        If a conversation has several turns or a system prompt and the template has room for one
        question; if the examples are plain text and the template is not `text`, or the reverse.
    """
    if alone:
        given = len(examples)
        places = [p for p, e in enumerate(examples) if _is_rendered(e, tokenizer, template)]
        found = tokenize_examples(
            [examples[p] for p in places], tokenizer, template, seq_length, train_on
        )
        return replace(
            found,
            unlearnable=found.unlearnable + given - len(places),
            positions=tuple(places[p] for p in found.positions),
        )
    check_text(template, sum(map(is_text, examples)), len(examples))
    if template == "text":
        return _tokenized_texts(examples, tokenizer, seq_length)
    prompts = _prompt_ids(examples, tokenizer, template)
    answers = answer_token_ids(tokenizer, template, [e.answer for e in examples])
    against = iter(
        answer_token_ids(tokenizer, template, [e.rejected for e in examples if e.rejected])
    )
    end = end_token_ids(tokenizer, template) if examples else ()
    kept, positions, truncated, unlearnable, unlearned = [], [], 0, 0, 0
    parts = zip(examples, prompts, answers, strict=True)
    for position, (example, prompt, answer) in enumerate(parts):
        ids = [*prompt, *answer, *end]
        if example.rejected:
            other = (*next(against), *end)
            pair = _pair(prompt, ids, other, seq_length)
            truncated += max(len(ids), len(prompt) + len(other)) > seq_length
            unlearnable += pair is None
            if pair is not None:
                kept.append(pair)
                positions.append(position)
            continue
        spans = _earlier_answers(example, prompt, tokenizer) if train_on == ANSWERS else []
        unlearned += spans.count(None)
        earlier = [(a, min(b, seq_length)) for a, b in filter(None, spans) if a < seq_length]
        if len(prompt) >= seq_length and not earlier:
            unlearnable += 1
            continue
        truncated += len(ids) > seq_length
        shown = tuple(ids[:seq_length])
        kept.append(TokenizedExample(shown, min(len(prompt), seq_length), tuple(earlier)))
        positions.append(position)
    shortened = _shortened(examples, tokenizer) if template == "chat" else 0
    counts = truncated, unlearnable, shortened, unlearned
    return TokenizedExamples(tuple(kept), *counts, tuple(positions))


def _pair(
    prompt: list[int], ids: list[int], rejected: tuple[int, ...], seq_length: int
) -> TokenizedExample | None:
    """Return a preference; None if nothing within the sequence length tells its answers apart.

    Only the two last answers are compared, so that of a conversation no earlier one is learned.
    """
    chosen, other = tuple(ids[:seq_length]), rejected[: max(0, seq_length - len(prompt))]
    if not other or chosen[len(prompt) :] == other:
        return None
    return TokenizedExample(chosen, len(prompt), rejected=other)


def _tokenized_texts(
    examples: Sequence[Example], tokenizer: Any, seq_length: int
) -> TokenizedExamples:
    """Return plain texts, of which all is learned but the first token, which nothing predicts."""
    first, end = put_first(tokenizer), tokenizer.eos_token_id
    kept, truncated = [], 0
    texts = [example.answer for example in examples]
    for said in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
        ids = (*first, *said, end)
        truncated += len(ids) > seq_length
        kept.append(TokenizedExample(ids[:seq_length], max(1, len(first))))
    return TokenizedExamples(tuple(kept), truncated, 0, positions=tuple(range(len(kept))))


def _prompt_ids(examples: Sequence[Example], tokenizer: Any, template: str) -> list[list[int]]:
    """Return the tokens before the answers of examples."""
    if is_own(template) and "instruction" in own_prompt(template).names:
        systems = [system_of(e.before, template) for e in examples]
        check_room(template, systems.count(None), len(examples))
        asked = [
            (e.apart[1], e.apart[0], system or "")
            for e, system in zip(examples, systems, strict=True)
        ]
        return own_prompt(template).prompt_ids(tokenizer, asked)
    turns = [(*e.before, ("user", e.question)) for e in examples]
    return conversation_token_ids(tokenizer, template, turns)


def _is_rendered(example: Example, tokenizer: Any, template: str) -> bool:
    """Whether a template can render an example and its answers."""
    try:
        check_text(template, int(is_text(example)), 1)
        [prompt] = _prompt_ids([example], tokenizer, template) if template != "text" else [[]]
        answer_token_ids(tokenizer, template, [example.answer])
        _earlier_answers(example, prompt, tokenizer)
    except (ConfigError, DataError):
        return False
    return True


def _earlier_answers(
    example: Example, prompt: list[int], tokenizer: Any
) -> list[tuple[int, int] | None]:
    """Return where each earlier answer of a conversation stands in its prompt, its end included.

    None where the template renders it, or what precedes it, differently from how the model would
    have had to answer.
    """
    spans: list[tuple[int, int] | None] = []
    if all(role != "assistant" for role, _ in example.before):
        return spans
    end = end_token_ids(tokenizer, "chat")
    for number, (role, said) in enumerate(example.before):
        if role != "assistant":
            continue
        text = rendered(tokenizer, example.before[:number], answering=True)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = [*answer_token_ids(tokenizer, "chat", [said])[0], *end]
        stop = len(asked) + len(answer)
        spans.append((len(asked), stop) if prompt[:stop] == [*asked, *answer] else None)
    return spans


def _shortened(examples: Sequence[Example], tokenizer: Any) -> int:
    """Return of how many answers the chat template leaves out the beginning or the end."""
    if not examples or not chat_format(tokenizer).is_prefix:
        return 0
    texts = chat_format(tokenizer).answer_texts(tokenizer, [e.answer for e in examples])
    return sum(e.answer.strip() not in text for e, text in zip(examples, texts, strict=True))


def collate(examples: Sequence[TokenizedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest one.

    Padding is masked by position, so the pad token may equal the end-of-sequence token.

    Returns
    -------
    dict
        `input_ids`, `attention_mask` and `labels`, each int64 of (batch, tokens); prompt and
        padding have the label `IGNORED_LABEL`.
    """
    import torch

    longest = max(len(e.input_ids) for e in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED_LABEL)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        learned = max(1, example.prompt_tokens)  # nothing before it predicts the first token
        for start, stop in (*example.earlier, (learned, len(ids))):
            labels[row, start:stop] = ids[start:stop]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def flatten(
    examples: Sequence[TokenizedExample], pad_token_id: int = 0, bucket_tokens: int = 1
) -> dict[str, Any]:
    """Concatenate examples into a single row, without padding between them.

    Parameters
    ----------
    bucket_tokens : int
        The row ends in `tail_tokens` pad tokens, as sequences of their own, which no label is in.

    Returns
    -------
    dict
        `input_ids`, `position_ids` (from 0 in each example) and `labels`, each int64 of
        (1, tokens); `sequence_lengths`, the number of tokens of each example; and their
        `starts_of`, `sequence_starts`. Prompts have the label `IGNORED_LABEL`, and so has the first
        token of each example, which nothing predicts.
    """
    import torch

    lengths = [len(e.input_ids) for e in examples]
    rest = tail_tokens(sum(lengths), bucket_tokens)
    ids = torch.cat(
        [*(torch.tensor(e.input_ids) for e in examples), torch.full((rest,), pad_token_id)]
    )
    labels = ids.clone()
    first = 0
    for example, length in zip(examples, lengths, strict=True):
        labels[first : first + max(1, example.prompt_tokens)] = IGNORED_LABEL
        for start, stop in example.earlier:
            labels[first + start : first + stop] = ids[first + start : first + stop]
        first += length
    labels[first:] = IGNORED_LABEL
    while rest:  # none longer than the longest example: LongRoPE goes by the highest position
        lengths.append(min(rest, max(lengths)))
        rest -= lengths[-1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "labels": labels.unsqueeze(0),
        "sequence_lengths": lengths,
        "sequence_starts": starts_of(lengths),
    }


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    """Return where each sequence of a row starts, and the row's end: int32 of (sequences + 1)."""
    import torch

    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tail_tokens(tokens: int, bucket_tokens: int) -> int:
    """Return how many tokens a row lacks to the next multiple of `bucket_tokens`.

    The multiple is halved until the tail is shorter than a 16th of the row.
    """
    while bucket_tokens > 1 and LARGEST_TAIL * bucket_tokens > tokens:
        bucket_tokens //= 2
    return -tokens % bucket_tokens
