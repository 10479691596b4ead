"""Batched prefill of prompts, with a shared prefix computed once.

A batch is laid out as

    | shared prefix | padding | rest of the prompt | continuation

so that every prompt ends in the same column: one pass gives the next-token logits of all of them,
and continuations are appended to the key-value cache. Padding is masked and takes no position, so
the results equal those of one prompt at a time up to rounding.
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
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from grandrounds.errors import ModelError
from grandrounds.model.positions import check_known, longrope_border

Ids = Sequence[int]

MIN_SHARED_TOKENS = 8
"""A shorter prefix is not worth a separate pass."""

CPU_PASS_TOKENS = 1024
"""Maximum number of tokens per CPU thread in one pass, unless a single prompt has more. A few
hundred reach the full rate; with many thousands activations outgrow the CPU's cache: a model of 6 M
parameters took three times as long in passes of 50,000 tokens as in short ones."""

_ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass
class Prefilled:
    """A batch of prompts that the model has processed."""

    rows: list[int]
    """Positions of the prompts in the caller's sequence."""
    logits: torch.Tensor
    """Next-token logits of each prompt: (batch, vocabulary)."""
    cache: Any
    """Keys and values of the whole layout, a transformers cache."""
    attention_mask: torch.Tensor
    """1 for tokens, 0 for padding: (batch, columns)."""
    ids: torch.Tensor | None = None
    """Without a cache, the tokens so far, (1, tokens): each continuation reads them again."""


SHARED, BATCHED, SINGLE, WHOLE = "shared", "batched", "single", "whole"
"""Layouts: with a shared prefix, padded on the left, one prompt at a time, or one at a time and
read again with each continuation."""

_READ = {
    BATCHED: "with a shared prefix; prompts are read whole",
    SINGLE: "with padded prompts; prompts are read one at a time",
    WHOLE: "from its cache, or has none; prompts are read again with each continuation",
}

EXACT = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Type of the weights → largest difference between two layouts, in standard deviations of the
logits, that is rounding."""

EXACT_IN_LESS = 0.2
"""The same for coarser types and quantised weights."""

_proven: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def proven_layout(model: Any, longest_tokens: int) -> str:
    """Return the fastest layout that gives a model the logits of one prompt at a time.

    `longest_tokens` is the length of the longest prompt with its continuation.

    Each model is probed once with two short prompts and a continuation: some count positions by
    columns, whatever `position_ids` say (MPT's ALiBi, GPT-Neo's local attention), and some forget
    their recurrent state when several tokens follow (Jamba). LongRoPE rotates all positions
    otherwise where the longest prompt of a pass is beyond its border, so that prompts beyond it are
    read alone.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if longest_tokens > longrope_border(base.config):
        return SINGLE
    if base not in _proven:
        _proven[base] = layout = _probed(model)
        if layout != SHARED:
            print(
                f"grandrounds: a base of type {base.config.model_type} gives other results "
                f"{_READ[layout]}.",
                file=sys.stderr,
            )
    return _proven[base]


def _probed(model: Any) -> str:
    """Return the fastest layout that agrees with single prompts on a probe."""
    most = model.config.get_text_config().vocab_size
    prefix = [3 + 7 * i % (most - 3) for i in range(2 * MIN_SHARED_TOKENS)]
    prompts = [[*prefix, *(3 + 11 * i % (most - 3) for i in range(n))] for n in (9, 2)]
    after = [3 + 5 * i % (most - 3) for i in range(3)]
    with evaluating(model):
        device = next(model.parameters()).device
        # without a cache: (prompts, 1 + 3, vocabulary), the last of a prompt and what follows
        plain = torch.stack(
            [
                model(input_ids=torch.tensor([[*prompt, *after]], device=device), use_cache=False)
                .logits[0, len(prompt) - 1 :]
                .float()
                for prompt in prompts
            ]
        )
        is_quantized = bool(getattr(model, "is_quantized", False))
        least = EXACT_IN_LESS if is_quantized else EXACT.get(model.dtype, EXACT_IN_LESS)
        most_apart = least * float(plain[:, 0].std())

        def agrees(rows: list[int], prefix_tokens: int, cache: Any) -> bool:
            found = _read_batch(model, prompts, rows, prefix_tokens, cache)
            following = torch.tensor([after] * len(rows), device=device)
            for _ in range(2):  # as for two options
                continued = extend(model, forked(found), following, torch.ones_like(following))
            logits = torch.cat([found.logits.unsqueeze(1), continued], dim=1).float()
            return float((logits - plain[rows]).abs().max()) <= most_apart

        if not _has_cache(model, prefix) or not all(agrees([row], 0, None) for row in (0, 1)):
            return WHOLE
        if not agrees([0, 1], 0, None):
            return SINGLE
        cache = _read_prefix(model, prefix, len(prompts[0]) + len(after))
        return SHARED if cache is None or agrees([0, 1], len(prefix), cache) else BATCHED


def _has_cache(model: Any, ids: list[int]) -> bool:
    """Whether a model returns a cache with keys and values."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
    return _holds_keys(_cache_in(output))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluate a model without gradients, restoring its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def prefill(
    model: Any, prompts: Sequence[Ids], batch_size: int, *, following_tokens: int
) -> Iterator[Prefilled]:
    """Yield the prompts in batches of similar length, longest first.

    Prompts that start with the most common `MIN_SHARED_TOKENS` tokens come first and share their
    common prefix; the others, such as prompts truncated on the left, follow without one.

    Parameters
    ----------
    model
        A causal language model of transformers, or a PEFT model around one, within `evaluating`.
        Its forward accepts a cache, `position_ids` and `logits_to_keep`.
    prompts
        Token ids of each prompt, none empty.
    batch_size : int
        Maximum number of prompts per forward pass; on a CPU `CPU_PASS_TOKENS` may lower it.
    following_tokens : int
        Length of the longest continuation that any of the prompts gets.

    Raises
    ------
    ModelError
        If a prompt has a token that the model has no embedding for.
    ValueError
        If a prompt has no tokens, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens")
    check_known(model.config, max((max(prompt) for prompt in prompts), default=0))
    on_cpu = next(model.parameters()).device.type == "cpu"
    most_tokens = CPU_PASS_TOKENS * torch.get_num_threads() if on_cpu else sys.maxsize
    whole = list(range(len(prompts)))
    longest_tokens = max(map(len, prompts), default=0) + following_tokens
    layout = proven_layout(model, longest_tokens) if prompts else BATCHED
    if layout == WHOLE:
        yield from (_read_whole(model, prompts, row) for row in whole)
        return
    if layout == SINGLE:
        batch_size = 1
    for rows, prefix in _groups(prompts) if layout == SHARED else [(whole, [])]:
        rows.sort(key=lambda row: -len(prompts[row]))
        prefix_cache = (
            _read_prefix(model, prefix, len(prompts[rows[0]]) + following_tokens)
            if prefix
            else None
        )
        shared_tokens = len(prefix) if prefix_cache is not None else 0
        while rows:
            width = len(prompts[rows[0]]) - shared_tokens
            count = max(1, min(batch_size, most_tokens // width))
            chosen, rows = rows[:count], rows[count:]
            yield _read_batch(model, prompts, chosen, shared_tokens, prefix_cache)


def shared_prefix(prompts: Sequence[Ids]) -> list[int]:
    """Return the longest common prefix that leaves every prompt at least one more token."""
    if not prompts:
        return []
    # The common prefix of the smallest and the largest is that of all in between.
    texts = [list(prompt) for prompt in prompts]
    first, last = min(texts), max(texts)
    limit = min(len(text) for text in texts) - 1
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in same][:limit]


def _groups(prompts: Sequence[Ids]) -> list[tuple[list[int], list[int]]]:
    """Return groups of rows with their prefix: those with the most common start, and all others."""
    starts = {
        row: tuple(prompt[:MIN_SHARED_TOKENS])
        for row, prompt in enumerate(prompts)
        if len(prompt) > MIN_SHARED_TOKENS
    }
    commonest, times = next(iter(Counter(starts.values()).most_common(1)), (None, 0))
    # A single prompt would share all of its tokens, and a separate pass would save nothing.
    sharing = [row for row, start in starts.items() if times > 1 and start == commonest]
    alone = sorted(set(range(len(prompts))).difference(sharing))
    groups = [(sharing, shared_prefix([prompts[row] for row in sharing])), (alone, [])]
    return [(rows, prefix) for rows, prefix in groups if rows]


def _read_prefix(model: Any, prefix: list[int], longest_tokens: int) -> Any:
    """Return the cache of a shared prefix for a batch of one; None if it cannot be reused.

    Padding after the prefix counts as distance in a sliding window, so the whole layout,
    `longest_tokens` with the continuation, must fit into the window; a recurrent state cannot be
    continued over padding at all.
    """
    device = next(model.parameters()).device
    input_ids = torch.tensor([prefix], device=device)
    cache = cache_of(model(input_ids=input_ids, use_cache=True, logits_to_keep=1))
    if type(cache) is not DynamicCache:
        return None
    for layer in cache.layers:
        if type(layer) not in _ATTENTION_LAYERS:
            return None
        if getattr(layer, "sliding_window", math.inf) <= longest_tokens:
            return None
    return cache


def _read_batch(
    model: Any, prompts: Sequence[Ids], rows: list[int], prefix_tokens: int, prefix_cache: Any
) -> Prefilled:
    """Process one batch, sorted longest first, after a prefix that is already in the cache."""
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


def _read_whole(model: Any, prompts: Sequence[Ids], row: int) -> Prefilled:
    """Process one prompt without a cache."""
    ids = torch.tensor([list(prompts[row])], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, -1]
    return Prefilled([row], logits, None, torch.ones_like(ids), ids)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that passes a cache to a forward, renamed in transformers 5.24."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(inner).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output.

    Raises
    ------
    ModelError
        If no layer of it holds keys and values.
    """
    cache = _cache_in(output)
    if not _holds_keys(cache):
        raise ModelError(
            "this base model has no key-value cache (purely recurrent?); batched prompts require "
            "attention layers."
        )
    return cache


def _cache_in(output: Any) -> Any:
    return output.get("cache", output.get("past_key_values"))


def _holds_keys(cache: Any) -> bool:
    return any(hasattr(layer, "keys") for layer in getattr(cache, "layers", ()))


def forked(batch: Prefilled) -> Prefilled:
    """Return a copy of the batch, so that a continuation leaves the original unchanged."""
    return replace(batch, cache=None if batch.cache is None else _copied(batch.cache))


def _copied(cache: Any) -> Any:
    """Copy a cache; attention layers may share tensors, since they replace them to grow.

    A model's own kind of cache may hold more than layers (MiniMax's linear attention).
    """
    if type(cache) is not DynamicCache:
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [
        copy.copy(layer) if type(layer) in _ATTENTION_LAYERS else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return copied


def extend(model: Any, batch: Prefilled, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Append tokens to every prompt of a batch and return the logits at each of them.

    The cache and the attention mask of `batch` grow by the columns of `tokens`; pass a `forked`
    batch to keep the original.

    Parameters
    ----------
    tokens : int64 tensor of (batch, columns)
    mask : int64 tensor of (batch, columns)
        1 for tokens, 0 for padding on the right.

    Returns
    -------
    tensor of (batch, columns, vocabulary)
    """
    if batch.ids is not None:
        batch.ids = torch.cat([batch.ids, tokens], dim=1)
        whole: torch.Tensor = model(input_ids=batch.ids, use_cache=False).logits
        return whole[:, -tokens.shape[1] :]
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
