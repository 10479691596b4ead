"""Prompts and continuations read by a model with a key-value cache."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from grandrounds.errors import ModelError
from grandrounds.model.passes import Ids, Unit

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
    """Without a cache, the tokens so far, padded on the right, (batch, columns): each continuation
    reads them again."""


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


def read_prefix(model: Any, prefix: list[int], longest_tokens: int) -> Any:
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


def read_batch(
    model: Any, prompts: Sequence[Ids], rows: list[int], prefix_tokens: int, prefix_cache: Any
) -> Prefilled:
    """Process one batch, sorted longest first, after a prefix that is already in the cache."""
    rests = [list(prompts[row])[prefix_tokens:] for row in rows]
    cache = _repeated(prefix_cache, len(rows))
    before = torch.ones((len(rows), prefix_tokens), dtype=torch.long)
    output, mask = _read(model, rests, before, cache)
    return Prefilled(rows, output.logits[:, -1], cache_of(output), mask)


def read_families(
    model: Any, prompts: Sequence[Ids], units: list[Unit], prefix_tokens: int, prefix_cache: Any
) -> Prefilled:
    """Process the stems of some families, then their prompts, after a prefix in the cache."""
    stems = [
        list(prompts[unit.rows[0]])[prefix_tokens : prefix_tokens + unit.stem_tokens]
        for unit in units
    ]
    before = torch.ones((len(units), prefix_tokens), dtype=torch.long)
    output, mask = _read(model, stems, before, _repeated(prefix_cache, len(units)))
    cache = cache_of(output)
    own = [place for place, unit in enumerate(units) for _ in unit.rows]
    cache.batch_select_indices(torch.tensor(own, device=mask.device))
    rows = [row for unit in units for row in unit.rows]
    rests = [
        list(prompts[row])[prefix_tokens + unit.stem_tokens :]
        for unit in units
        for row in unit.rows
    ]
    output, mask = _read(model, rests, mask.cpu()[own], cache)
    return Prefilled(rows, output.logits[:, -1], cache_of(output), mask)


def _repeated(cache: Any, times: int) -> Any:
    """Return a copy of the cache of one row for several; None without one."""
    if cache is None:
        return None
    copied = _copied(cache)
    copied.batch_repeat_interleave(times)
    return copied


def _read(
    model: Any, rests: Sequence[list[int]], before: torch.Tensor, cache: Any
) -> tuple[Any, torch.Tensor]:
    """Process tokens, padded on the left, after what the cache holds.

    Parameters
    ----------
    before : int64 tensor of (batch, columns in the cache)
        1 for tokens, 0 for padding.

    Returns
    -------
    the model's output with the logits of the last column, and the mask of all columns
    """
    width, columns = max(map(len, rests)), before.shape[1]
    input_ids = torch.zeros((len(rests), width), dtype=torch.long)
    mask = torch.cat([before, torch.ones((len(rests), width), dtype=torch.long)], dim=1)
    for i, rest in enumerate(rests):
        padding = width - len(rest)
        input_ids[i, padding:] = torch.tensor(rest)
        mask[i, columns : columns + padding] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, columns:]
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
    return output, mask


def read_whole(model: Any, prompts: Sequence[Ids], rows: list[int]) -> Prefilled:
    """Process prompts without a cache, padded on the right: no token sees what comes after it."""
    chosen = [torch.tensor(list(prompts[row])) for row in rows]
    ids = pad_sequence(chosen, batch_first=True)
    mask = pad_sequence([torch.ones_like(one) for one in chosen], batch_first=True)
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    last = mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
    return Prefilled(rows, _logits_at(model, ids, last)[:, 0], None, mask, ids)


def _logits_at(model: Any, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the logits at some columns of each prompt: (batch, columns, vocabulary)."""
    if len(ids) == 1:  # no padding
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[:, columns[0]]
    kept, places = torch.unique(columns, return_inverse=True)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return logits[torch.arange(len(ids), device=ids.device).unsqueeze(1), places]


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
    cache = cache_in(output)
    if not holds_keys(cache):
        raise ModelError(
            "this base model has no key-value cache (purely recurrent?); batched prompts require "
            "attention layers."
        )
    return cache


def cache_in(output: Any) -> Any:
    return output.get("cache", output.get("past_key_values"))


def holds_keys(cache: Any) -> bool:
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


def may_branch(cache: Any) -> bool:
    """Whether a cache can be continued after padding of any width: it has no windows, in which
    padding counts as distance, and no recurrent state."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


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
        return _read_again(model, batch, batch.ids, tokens, mask)
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


def _read_again(
    model: Any, batch: Prefilled, ids: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Append tokens to the prompts of a batch without a cache, each after its last one."""
    done = batch.attention_mask.sum(dim=1, keepdim=True)
    places = done + torch.arange(tokens.shape[1], device=ids.device)  # (batch, columns)
    room = torch.zeros_like(tokens)
    longest = int((done + mask.sum(dim=1, keepdim=True)).max())
    batch.ids = torch.cat([ids, room], dim=1).scatter(1, places, tokens)[:, :longest]
    whole = torch.cat([batch.attention_mask, room], dim=1).scatter(1, places, mask)
    batch.attention_mask = whole[:, :longest]
    return _logits_at(model, batch.ids, places.clamp(max=longest - 1))
