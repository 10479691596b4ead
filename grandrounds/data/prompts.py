"""Prompt templates, shared by training and evaluation: `alpaca`, `chat`, `text`, or one's own.

A template turns a question into all text before the answer. The loss covers the answer, including
its leading space where it has one.
"""

from __future__ import annotations

import hashlib
from typing import Any

from grandrounds.data.chat import chat_format, rendered
from grandrounds.data.own_prompt import is_own, own_prompt
from grandrounds.errors import ConfigError

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n### Instruction:\n{question}\n### Response:"
)
"""FlowerTune's prompt (flwr new @flwrlabs/flowertune-medical, `dataset.py`), after Stanford Alpaca.
"""

TEMPLATES = ("alpaca", "chat", "text")
"""`alpaca`: FlowerTune's prompt. `chat`: the tokenizer's chat template. `text`: none, for plain
text; a question is then a text that the model continues."""


def build_prompt(template: str, question: str, tokenizer: Any = None) -> str:
    """Return the text before the answer.

    Parameters
    ----------
    template : str
        One of `TEMPLATES`, or the text of one's own.
    question : str
    tokenizer : transformers tokenizer, optional
        Needed for `chat`, with a chat template, and where one's own names special tokens.

    Raises
    ------
    ConfigError
        For an unknown template, one's own that is not valid, or `chat` with a tokenizer that has
        no chat template.
    """
    if is_own(template):
        return own_prompt(template).prompt(tokenizer, question)
    if template == "alpaca":
        return ALPACA.format(question=question)
    if template == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                'data.prompt-template = "chat" needs a tokenizer with a chat template, which this '
                'base lacks: use data.prompt-template = "alpaca", or an instruction-tuned model.'
            )
        return rendered(tokenizer, [("user", question)], answering=True)
    if template == "text":
        return question
    raise ConfigError(
        f"data.prompt-template = {template!r} is unknown; allowed: {', '.join(TEMPLATES)}."
    )


def response_text(template: str, answer: str) -> str:
    """Return the answer as it follows the prompt: `alpaca` and `text` put a space between."""
    if is_own(template):
        return own_prompt(template).lead + answer
    return f" {answer}" if template in ("alpaca", "text") else answer


def prompt_hash(template: str, tokenizer: Any = None) -> str:
    """Return 16 hex digits that identify the text around questions and answers."""
    if is_own(template):
        own_prompt(template)
        tokens = (tokenizer.bos_token, tokenizer.eos_token) if tokenizer else ()
        return hashlib.sha256("\x00".join((template, *map(str, tokens))).encode()).hexdigest()[:16]
    probe = build_prompt(template, "\x00question\x00", tokenizer) + response_text(template, "\x00")
    if template == "chat":
        form = chat_format(tokenizer)
        own = () if form.end == (tokenizer.eos_token_id,) else form.end
        probe += form.lead + "".join(f"\x00{token}" for token in own)
    return hashlib.sha256(probe.encode()).hexdigest()[:16]
