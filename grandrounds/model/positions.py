"""How long a text a base can read, and which tokens it knows, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from torch.nn import Embedding

from grandrounds.errors import ModelError
from grandrounds.model.base import base_config
from grandrounds.model.lora import without_weights
from grandrounds.model.targets import text_model

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Keys of a base's configuration that state how many tokens it was made for."""


def longrope_border(config: Any) -> float:
    """Return the number of tokens beyond which LongRoPE changes its rotation; else infinity."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return math.inf
    own = getattr(text, "original_max_position_embeddings", None)
    return float(rope.get("original_max_position_embeddings") or own or math.inf)


def check_length(name: str, seq_length: int) -> None:
    """Raise `ModelError` if training sequences cross a base's LongRoPE border.

    Sequences on both sides of it in one batch would be rotated by the longest.
    """
    border = longrope_border(base_config(name))
    if seq_length > border:
        raise ModelError(
            f"train.seq-length = {seq_length} crosses the LongRoPE border of {name!r}, "
            f"{border:.0f} tokens: batches would mix two rotations. Set train.seq-length to at "
            f"most {border:.0f}."
        )


def check_examples(name: str, examples: Iterable[Sequence[int]]) -> None:
    """Raise `ModelError` if a base cannot read tokenised examples, given as token ids.

    They may be longer than the table of positions it has, or hold tokens that it has no embedding
    for, such as markers added to the tokenizer only. No weights are loaded.
    """
    longest_tokens, highest = 0, 0
    for ids in examples:
        longest_tokens = max(longest_tokens, len(ids))
        highest = max(highest, max(ids, default=0))
    config = base_config(name)
    check_known(config, highest)
    stated = [getattr(config.get_text_config(), key, None) for key in _LENGTHS]
    if longest_tokens <= min((length for length in stated if length), default=math.inf):
        return  # most bases: no model needs to be built
    most = position_limit(name)
    if longest_tokens > most:
        raise ModelError(
            f"{name!r} has a table of {most:.0f} positions, and the longest example takes "
            f"{longest_tokens:,} tokens. Set train.seq-length to at most {most:.0f}."
        )


def check_known(config: Any, highest: int) -> None:
    """Raise `ModelError` if a model with this configuration has no embedding for a token id."""
    embeddings = config.get_text_config().vocab_size
    if highest >= embeddings:
        raise ModelError(
            f"The tokenizer does not belong to its model: a text has the token id {highest}, and "
            f"there are {embeddings:,} embeddings. Markers were added to the tokenizer alone: use "
            'a base with embeddings for them, or data.prompt-template = "alpaca".'
        )


@lru_cache(maxsize=8)
def position_limit(name: str) -> float:
    """Return the number of positions in a base's table; infinity where it computes them.

    Tables are learned (GPT-2, OPT), or computed once for a stated length (GPT-J, MPT).
    """
    model = without_weights(name)
    text, _ = text_model(model)
    tables = [math.inf]
    for path, module in text.named_modules():
        last = path.rpartition(".")[2]
        if isinstance(module, Embedding) and ("pos" in last or last == "wpe"):
            tables.append(module.num_embeddings - getattr(module, "offset", 0))
    for path, buffer in text.named_buffers():
        if "pos" in path.rpartition(".")[2] and buffer.dim() > 1:
            tables.append(buffer.shape[-2])
    if model.config.model_type == "mpt":
        tables.append(model.config.max_seq_len)
    return min(tables)
