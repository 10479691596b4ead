"""An example as it is trained on, with what is learned marked, for the eyes of who owns it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from grandrounds.data.tokenization import TokenizedExample

OPENS, CLOSES = "⟦", "⟧"
"""Enclose what is learned."""


def marked(example: TokenizedExample, tokenizer: Any) -> str:
    """Return the text of an example's tokens, with what is learned between ⟦ and ⟧."""
    length = len(example.input_ids)
    spans = (*example.earlier, (max(1, example.prompt_tokens), length))
    learned = [any(start <= place < stop for start, stop in spans) for place in range(length)]
    parts = []
    for is_learned, places in groupby(range(length), key=learned.__getitem__):
        text = tokenizer.decode([example.input_ids[place] for place in places])
        parts.append(f"{OPENS}{text}{CLOSES}" if is_learned else text)
    return "".join(parts)
