"""Tokenises prompt and answer separately, so that the loss mask is exact for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grandrounds.data.chat import apart, chat_format
from grandrounds.data.prompts import build_prompt, response_text

if TYPE_CHECKING:
    import torch

    from grandrounds.data.examples import Example

IGNORED_LABEL = -100
"""Label of every position that the loss ignores."""


@dataclass(frozen=True)
class TokenizedExample:
    """One example as input to the model."""

    input_ids: tuple[int, ...]
    """Prompt, answer and the tokens that end it."""
    prompt_tokens: int
    """Number of prompt tokens at the start of `input_ids`; the loss ignores exactly these."""


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
    positions: tuple[int, ...] = ()
    """Position of each example among those given."""


def prompt_token_ids(tokenizer: Any, template: str, questions: Sequence[str]) -> list[list[int]]:
    """Return the prompts' tokens, with beginning-of-sequence where the tokenizer adds one.

    A chat template contains its own special tokens, so none are added.
    """
    if not questions:
        return []
    texts = [build_prompt(template, question, tokenizer) for question in questions]
    ids = tokenizer(texts, add_special_tokens=template != "chat")["input_ids"]
    eos = tokenizer.eos_token_id
    return [i[:-1] if template != "chat" and i and i[-1] == eos else i for i in ids]


def answer_token_ids(tokenizer: Any, template: str, answers: Sequence[str]) -> list[list[int]]:
    """Return the answers' tokens as they follow a prompt, without their end."""
    if not answers:
        return []
    if template == "chat":
        form = chat_format(tokenizer)
        return form.answer_ids(tokenizer, form.answer_texts(tokenizer, answers))
    return apart(tokenizer, [response_text(template, answer) for answer in answers])


def end_token_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """Return the tokens that end an answer: the chat template's end of turn, or end-of-sequence."""
    return chat_format(tokenizer).end if template == "chat" else (tokenizer.eos_token_id,)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, template: str, seq_length: int
) -> TokenizedExamples:
    """Tokenise a site's examples.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer with an end-of-sequence token.
    template : str
        A prompt template of `grandrounds.data.prompts`.
    seq_length : int
        Maximum sequence length in tokens, prompt plus answer; only answers are truncated.
    """
    prompts = prompt_token_ids(tokenizer, template, [e.question for e in examples])
    answers = answer_token_ids(tokenizer, template, [e.answer for e in examples])
    end = end_token_ids(tokenizer, template) if examples else ()
    kept, positions, truncated, unlearnable = [], [], 0, 0
    for position, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer, *end]
        if len(prompt) >= seq_length:
            unlearnable += 1
            continue
        truncated += len(ids) > seq_length
        kept.append(TokenizedExample(tuple(ids[:seq_length]), len(prompt)))
        positions.append(position)
    shortened = _shortened(examples, tokenizer) if template == "chat" else 0
    return TokenizedExamples(tuple(kept), truncated, unlearnable, shortened, tuple(positions))


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
        labels[row, learned : len(ids)] = ids[learned:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def flatten(examples: Sequence[TokenizedExample]) -> dict[str, Any]:
    """Concatenate examples into a single row, without padding.

    Returns
    -------
    dict
        `input_ids`, `position_ids` (from 0 in each example) and `labels`, each int64 of
        (1, tokens), and `sequence_lengths`, the number of tokens of each example. Prompts have the
        label `IGNORED_LABEL`, and so has the first token of each example, which nothing predicts.
    """
    import torch

    lengths = [len(e.input_ids) for e in examples]
    ids = torch.cat([torch.tensor(e.input_ids) for e in examples])
    labels = ids.clone()
    start = 0
    for example, length in zip(examples, lengths, strict=True):
        labels[start : start + max(1, example.prompt_tokens)] = IGNORED_LABEL
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": ids.unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "labels": labels.unsqueeze(0),
        "sequence_lengths": lengths,
    }
