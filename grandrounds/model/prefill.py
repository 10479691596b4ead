"""Prompts in batches, with what they share computed once.

A batch is laid out as

    | shared prefix | padding | rest of the prompt | continuation

so that every prompt ends in the same column: one product gives the logits that follow each of them,
and continuations are appended to the cache of keys and values. Padding is masked and takes no
position, so the numbers are those of one prompt at a time up to rounding.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grandrounds.errors import ModelError

Ids = Sequence[int]

MIN_SHARED_TOKENS = 8
"""A shorter beginning in common is not worth a pass of its own."""

CPU_PASS_TOKENS = 1024
"""Most tokens per thread that a CPU reads in one pass, unless one prompt has more. With some
hundred it computes at its full rate already; with many thousands, activations outgrow its cache: a
model of 6 M parameters took three times as long for passes of 50,000 tokens as for short ones."""

WINDOW_MARGIN_TOKENS = 128
"""Room kept in a sliding window for continuations, where a prefix is shared."""

_ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass
class Prefilled:
    """A batch of prompts that the model has read."""

    rows: list[int]
    """Which prompts these are, as positions in the caller's sequence."""
    logits: torch.Tensor
    """What follows each prompt: (batch, vocabulary), as the model computed it."""
    cache: Any
    """Keys and values of the whole layout, a transformers cache."""
    attention_mask: torch.Tensor
    """1 for tokens, 0 for padding: (batch, columns)."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back into its former mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def prefill(model: Any, prompts: Sequence[Ids], batch_size: int) -> Iterator[Prefilled]:
    """Yield the prompts in batches of similar length, longest first.

    Prompts that begin as most do, in `MIN_SHARED_TOKENS` or more tokens, come first and share what
    they have in common; the others, such as prompts cut on the left, follow without.

    Parameters
    ----------
    model
        A causal language model of transformers in evaluation mode, without gradients (see
        `evaluating`), or a PEFT model around one; its forward knows a cache, `position_ids`
        and `logits_to_keep`.
    prompts
        Token ids of each prompt, none empty.
    batch_size : int
        Most prompts in one forward pass; a CPU takes fewer where they have too many tokens (see
        `CPU_PASS_TOKENS`).

    Raises
    ------
    ValueError
        If a prompt has no tokens, or `batch_size` is below 1.
    ModelError
        If the model keeps no cache of keys and values.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens")
    on_cpu = next(model.parameters()).device.type == "cpu"
    most_tokens = CPU_PASS_TOKENS * torch.get_num_threads() if on_cpu else sys.maxsize
    for rows, prefix in _groups(prompts):
        rows.sort(key=lambda row: -len(prompts[row]))
        prefix_cache = _read_prefix(model, prefix, len(prompts[rows[0]])) if prefix else None
        shared_tokens = len(prefix) if prefix_cache is not None else 0
        while rows:
            width = len(prompts[rows[0]]) - shared_tokens
            count = max(1, min(batch_size, most_tokens // width))
            chosen, rows = rows[:count], rows[count:]
            yield _read_batch(model, prompts, chosen, shared_tokens, prefix_cache)


def shared_prefix(prompts: Sequence[Ids]) -> list[int]:
    """Return the tokens with which all prompts begin; each keeps at least one token after them."""
    if not prompts:
        return []
    # What the smallest and the largest have in common, all in between have too.
    texts = [list(prompt) for prompt in prompts]
    first, last = min(texts), max(texts)
    limit = min(len(text) for text in texts) - 1
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in same][:limit]


def _groups(prompts: Sequence[Ids]) -> list[tuple[list[int], list[int]]]:
    """Return rows and what they share: those with the commonest beginning, and all others."""
    starts = {
        row: tuple(prompt[:MIN_SHARED_TOKENS])
        for row, prompt in enumerate(prompts)
        if len(prompt) > MIN_SHARED_TOKENS
    }
    commonest, times = next(iter(Counter(starts.values()).most_common(1)), (None, 0))
    # Of one prompt everything would be shared; a pass of its own for that would save nothing.
    sharing = [row for row, start in starts.items() if times > 1 and start == commonest]
    alone = sorted(set(range(len(prompts))).difference(sharing))
    groups = [(sharing, shared_prefix([prompts[row] for row in sharing])), (alone, [])]
    return [(rows, prefix) for rows, prefix in groups if rows]


def _read_prefix(model: Any, prefix: list[int], longest_tokens: int) -> Any:
    """Return the cache of a shared prefix, for a batch of one; None if none may be kept.

    Padding between the prefix and the rest counts as distance in a sliding window, so the whole
    layout must fit into the window; a recurrent state cannot be continued over padding at all.
    """
    device = next(model.parameters()).device
    input_ids = torch.tensor([prefix], device=device)
    cache = cache_of(model(input_ids=input_ids, use_cache=True, logits_to_keep=1))
    for layer in cache.layers:
        if type(layer) not in _ATTENTION_LAYERS:
            return None
        if getattr(layer, "sliding_window", math.inf) <= longest_tokens + WINDOW_MARGIN_TOKENS:
            return None
    return cache


def _read_batch(
    model: Any, prompts: Sequence[Ids], rows: list[int], prefix_tokens: int, prefix_cache: Any
) -> Prefilled:
    """Read one batch, given longest first, after a prefix that is in the cache already."""
    rests = [list(prompts[row])[prefix_tokens:] for row in rows]
    width = len(rests[0])
    input_ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.ones((len(rows), prefix_tokens + width), dtype=torch.long)
    for i, rest in enumerate(rests):
        padding = width - len(rest)
        input_ids[i, padding:] = torch.tensor(rest)
        mask[i, prefix_tokens : prefix_tokens + padding] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix_tokens:]
    cache = None
    if prefix_cache is not None:
        cache = _copied(prefix_cache)
        cache.batch_repeat_interleave(len(rows))
    device = next(model.parameters()).device
    mask = mask.to(device)
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=positions.to(device),
        use_cache=True,
        logits_to_keep=1,
        **with_cache(model, cache),
    )
    return Prefilled(rows, output.logits[:, -1], cache_of(output), mask)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that gives a cache to a model's forward: transformers 5.24 renamed it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(inner).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model filled.

    Raises
    ------
    ModelError
        If no layer of it keeps keys and values.
    """
    cache = output.get("cache", output.get("past_key_values"))
    if not any(hasattr(layer, "keys") for layer in getattr(cache, "layers", ())):
        raise ModelError(
            "this base keeps no cache of keys and values, as purely recurrent models do not; "
            "batches of prompts need one with attention layers."
        )
    return cache


def forked(batch: Prefilled) -> Prefilled:
    """Return the batch again, so that one continuation leaves nothing behind for the next."""
    return replace(batch, cache=_copied(batch.cache))


def _copied(cache: Any) -> Any:
    """Copy a cache; attention layers replace their tensors when they grow, and so may share."""
    copied = copy.copy(cache)
    copied.layers = [
        copy.copy(layer) if type(layer) in _ATTENTION_LAYERS else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return copied


def extend(model: Any, batch: Prefilled, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Append tokens to every prompt of a batch; return the logits at each of them.

    The cache and the attention mask of `batch` grow by the columns of `tokens`; give a `forked`
    batch to keep it as it is.

    Parameters
    ----------
    tokens : int64 tensor of (batch, columns)
        What is appended.
    mask : int64 tensor of (batch, columns)
        1 for tokens, 0 for padding on the right.

    Returns
    -------
    tensor of (batch, columns, vocabulary)
    """
    done = batch.attention_mask.sum(dim=1, keepdim=True)
    batch.attention_mask = torch.cat([batch.attention_mask, mask], dim=1)
    output = model(
        input_ids=tokens,
        attention_mask=batch.attention_mask,
        position_ids=(done + mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        **with_cache(model, batch.cache),
    )
    batch.cache = cache_of(output)
    logits: torch.Tensor = output.logits
    return logits
