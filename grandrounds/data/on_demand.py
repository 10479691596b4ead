"""Examples of stored rows, tokenised when a visit needs them.

Tokens take more memory than the text, and tokenising all of a large source takes longer than a run
may: most visits see a small part of it. What must be known of all examples beforehand is which of
them can be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from grandrounds.data.chat import rendered
from grandrounds.data.examples import Digests, Example, Examples
from grandrounds.data.own_prompt import is_own, own_prompt
from grandrounds.data.prompts import build_prompt
from grandrounds.data.tokenization import (
    ANSWERS,
    TokenizedExample,
    check_room,
    check_text,
    is_text,
    system_of,
    tokenize_examples,
)

_MOST_BYTES = 11
"""Bytes that Unicode's compatibility forms make of one, at most (the FAQ of Unicode's normal forms,
https://www.unicode.org/faq/normalization.html); ASCII they leave as it is."""


class OnDemand(Sequence[TokenizedExample]):
    """Examples that can be learned, each tokenised when it is asked for."""

    def __init__(
        self,
        examples: Examples,
        tokenizer: Any,
        template: str,
        seq_length: int,
        train_on: str = ANSWERS,
    ) -> None:
        """Find which of the examples can be learned; parameters as of `tokenize_examples`.

        Raises
        ------
        DataError
            If a conversation has several turns or a system prompt and the template has room for one
            question; if the examples are plain text and the template is not `text`, or the reverse.
        """
        self._examples, self._tokenizer, self._template = examples, tokenizer, template
        self._seq_length, self._train_on = seq_length, train_on
        self._positions = self._learnable()
        self.unlearnable = len(examples) - len(self._positions)
        """Examples left out because the prompt fills the sequence."""

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, place: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[TokenizedExample, ...]: ...
    def __getitem__(self, place: int | slice) -> TokenizedExample | tuple[TokenizedExample, ...]:
        if isinstance(place, slice):
            return tuple(self._tokenized(self._examples[i])[0] for i in self._positions[place])
        return self._tokenized(self._examples[self._positions[place]])[0]

    def _tokenized(self, example: Example) -> tuple[TokenizedExample, ...]:
        """Return the example, or nothing if it cannot be learned."""
        how = self._tokenizer, self._template, self._seq_length, self._train_on
        return tokenize_examples([example], *how).examples

    @property
    def digests(self) -> Digests:
        """Of what the examples say, in their order."""
        return self._examples.digests[self._positions]

    def _learnable(self) -> NDArray[np.int64]:
        """Return the positions of examples with an answer within the sequence length.

        A token covers a byte at least: most prompts need not be tokenised to know that they fit.
        """
        added = len(self._tokenizer("")["input_ids"]) + 1  # SentencePiece prepends a space
        learnable = np.ones(len(self._examples), bool)
        texts = in_vain = 0
        for position, example in enumerate(self._examples):
            if is_text(example):
                texts += 1
                continue
            text = self._prompt(example)
            if text is None:
                in_vain += 1
                continue
            most = added + len(text.encode()) * (1 if text.isascii() else _MOST_BYTES)
            if most >= self._seq_length:
                learnable[position] = bool(self._tokenized(example))
        check_text(self._template, texts, len(self._examples))
        check_room(self._template, in_vain, len(self._examples))
        return np.flatnonzero(learnable)

    def _prompt(self, example: Example) -> str | None:
        """Return the text before an answer; None if the template has no room for what is said."""
        tokenizer, template, before = self._tokenizer, self._template, example.before
        if is_own(template):
            own, system = own_prompt(template), system_of(before, template)
            if system is None:
                return None
            is_apart = "instruction" in own.names
            instruction, question = example.apart if is_apart else ("", example.question)
            return own.prompt(tokenizer, question, instruction, system)
        if not before:
            return build_prompt(template, example.question, tokenizer)
        if template != "chat":
            return None
        return rendered(tokenizer, (*before, ("user", example.question)), answering=True)
