"""Streams the answers of a run's base and tuned model to the same question.

The base is loaded once, and its own answers are generated with the adapter disabled. Prompts use
the run's template, and decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from grandrounds.data.chat_settings import ChatSettings
from grandrounds.data.conversations import Turn
from grandrounds.data.tokenization import conversation_token_ids, end_token_ids
from grandrounds.errors import DataError
from grandrounds.model.base import BaseSpec
from grandrounds.model.cached import Prefilled, extend
from grandrounds.model.prefill import prefill
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.model.saved import check_fit, lora_spec, read_adapter
from grandrounds.model.scoring import stop_tokens
from grandrounds.model.tokenizers import tokenizer_of
from grandrounds.server.directory import Checkpoint
from grandrounds.study.evaluation.likelihood import context_length


@dataclass
class Answer:
    """An answer generated so far."""

    text: str = ""
    """Text, without leading whitespace and control characters."""
    tokens: int = 0
    """Number of generated tokens."""
    end: str = ""
    """Empty while generating; `stopped` at a stop token; `cut` at the token limit."""


class Interview:
    """The loaded models of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load base, adapter and tokenizer.

        Raises
        ------
        ModelError
            If one of them cannot be loaded, or they do not fit.
        """
        model = checkpoint.config.model
        spec = lora_spec(checkpoint.folder)
        check_fit(checkpoint.folder, spec, model.source)
        adapter = read_adapter(checkpoint.folder)
        self._tokenizer = tokenizer_of(model.source, ChatSettings(*checkpoint.config.data.chat))
        self._template = checkpoint.config.data.prompt
        self._end = end_token_ids(self._tokenizer, self._template)
        base = BaseSpec(model.source, model.quantization, model.dtype)
        self._resident = resident_model(base, spec)
        self._resident.model.eval()
        set_adapter(self._resident, adapter)

    @property
    def converses(self) -> bool:
        """Whether the run's prompt has room for what was said before."""
        return self._template == "chat"

    def answer(
        self, question: str, *, tuned: bool, max_tokens: int, before: Sequence[Turn] = ()
    ) -> Iterator[Answer]:
        """Yield the growing answer of the base or the tuned model, the last one with its end.

        Several answers can be consumed in turns.

        Parameters
        ----------
        before
            What was said before the question; only where the model `converses`.

        Raises
        ------
        DataError
            If the question, with what was said before, fills the model's context.
        """
        turns = [(*before, ("user", question))]
        (prompt,) = conversation_token_ids(self._tokenizer, self._template, turns)
        context = context_length(self._resident.model.config)
        if len(prompt) >= context:
            raise DataError(
                f"The question takes {len(prompt):,} tokens with its prompt, and the model's "
                f"context is {context:,}: ask a shorter one{', or begin anew' if before else ''}."
            )
        most = min(max_tokens, context - len(prompt))
        ids: list[int] = []
        text = ""
        for token in self._tokens(prompt, tuned, most):
            ids.append(token)
            text = self._text(ids)
            if not text.endswith("\ufffd"):  # else the last character is incomplete
                yield Answer(text, len(ids))
        yield Answer(self._text(ids), len(ids), "cut" if len(ids) == most else "stopped")

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return printable(text).lstrip()

    def _tokens(self, prompt: Sequence[int], tuned: bool, most: int) -> Iterator[int]:
        """Yield greedily decoded tokens up to, and without, a stop token, as an evaluation does."""
        model = self._resident.model
        stop = stop_tokens(model, self._tokenizer, self._end)
        read: Prefilled | None = None
        token = -1
        for _ in range(most):
            adapter = nullcontext() if tuned else model.disable_adapter()
            with adapter, torch.inference_mode():
                if read is None:
                    (read,) = prefill(model, [prompt], 1, following_tokens=most)
                    logits = read.logits  # (1, vocabulary)
                else:
                    new = torch.tensor([[token]], device=self._resident.device)
                    logits = extend(model, read, new, torch.ones_like(new))[:, -1]
            token = int(logits.argmax())
            if token in stop:
                return
            yield token


def printable(text: str) -> str:
    """Remove control characters, so that no output controls the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
