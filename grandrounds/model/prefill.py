"""Batched prefill of prompts, with a shared prefix computed once.

A batch is laid out as

    | shared prefix | padding | rest of the prompt | continuation

so that every prompt ends in the same column: one pass gives the next-token logits of all of them,
and continuations are appended to the key-value cache. Padding is masked and takes no position, so
the results equal those of one prompt at a time up to rounding.

Prompts of a family, such as one question with its options in several orders, may share a stem that
is read once for all of them, after the prefix (Juravsky et al., Hydragen, 2024, section 3.4, share
prefixes on several levels; here keys and values are copied for each prompt):

    | shared prefix | padding | stem | padding | rest of the prompt | continuation
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from grandrounds.model.base import is_out_of_memory
from grandrounds.model.cached import (
    Prefilled,
    cache_in,
    evaluating,
    extend,
    forked,
    holds_keys,
    may_branch,
    read_batch,
    read_families,
    read_prefix,
    read_whole,
)
from grandrounds.model.passes import (
    MIN_SHARED_TOKENS,
    Ids,
    Limits,
    Unit,
    batches,
    groups,
    stems,
)
from grandrounds.model.positions import check_known, longrope_border
from grandrounds.model.rounding import differ_by_rounding, rerounded

SHARED, BATCHED, SINGLE, WHOLE, ALONE = "shared", "batched", "single", "whole", "alone"
"""Layouts: with a shared prefix, padded on the left, one prompt at a time; without a cache, prompts
are padded on the right, or one at a time, and read again with each continuation."""

_READ = {
    BATCHED: "with a shared prefix; prompts are read whole",
    SINGLE: "with padded prompts; prompts are read one at a time",
    WHOLE: "from its cache, or has none; prompts are read again with each continuation",
    ALONE: "from its cache and with padded prompts; prompts are read one at a time, and again with "
    "each continuation",
}

EXACT = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Type of the weights → largest difference between two layouts, in standard deviations of the
logits, that is rounding."""

EXACT_IF_QUANTIZED = 0.2
"""The same for quantised weights, which kernels dequantise in different ways. In coarser types, and
beyond this, `rounding` tells what is rounding."""

CPU_PASS_TOKENS = 1024
"""Maximum number of tokens per CPU thread in one pass, unless a single prompt has more. A few
hundred reach the full rate; with many thousands activations outgrow the CPU's cache: a model of 6 M
parameters took three times as long in passes of 50,000 tokens as in short ones."""

CUDA_PASS_TOKENS = 16_384
"""Maximum number of tokens in one pass on a GPU: enough for its full rate of products, at which one
pass of an 8B base takes half a second."""

CUDA_ENOUGH_TOKENS = 2048
"""Tokens at which a pass of an 8B base takes a GPU longer than Python takes to start it."""

CUDA_SHARE = 0.5
"""Share of the free memory of a GPU that a pass may plan to fill."""

CPU_BATCH = 16
"""Prompts per pass on a CPU where the caller sets no number."""

_proven: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_families_proven: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


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

        def read(prompt: list[int]) -> torch.Tensor:
            ids = torch.tensor([[*prompt, *after]], device=device)
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return logits[0, len(prompt) - 1 :].float()

        # without a cache: (prompts, 1 + 3, vocabulary), the last of a prompt and what follows
        plain = torch.stack([read(prompt) for prompt in prompts])
        agree = _agreement(model, plain[:, 0])

        def again(rows: list[int]) -> torch.Tensor:
            with rerounded(model):
                return torch.stack([read(prompts[row]) for row in rows])

        def agrees(rows: list[int], found: Prefilled) -> bool:
            following = torch.tensor([after] * len(rows), device=device)
            for _ in range(2):  # as for two options
                continued = extend(model, forked(found), following, torch.ones_like(following))
            logits = torch.cat([found.logits.unsqueeze(1), continued], dim=1).float()
            return agree(logits, plain[rows], partial(again, rows))

        def cached(rows: list[int], prefix_tokens: int = 0, cache: Any = None) -> bool:
            return agrees(rows, read_batch(model, prompts, rows, prefix_tokens, cache))

        both = [0, 1]
        if not _has_cache(model, prefix) or not all(cached([row]) for row in both):
            return WHOLE if agrees(both, read_whole(model, prompts, both)) else ALONE
        if not cached(both):
            return SINGLE
        cache = read_prefix(model, prefix, len(prompts[0]) + len(after))
        return SHARED if cache is None or cached(both, len(prefix), cache) else BATCHED


Agreement = Callable[[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]], bool]
"""Whether logits are the plain ones but for rounding; a function of them and of plain ones that are
`rerounded`."""


def _agreement(model: Any, logits: torch.Tensor) -> Agreement:
    """Return what tells whether a model's logits agree; `logits` give their scale."""
    is_quantized = bool(getattr(model, "is_quantized", False))
    share = EXACT_IF_QUANTIZED if is_quantized else EXACT.get(model.dtype, 0.0)
    most = share * float(logits.std())
    is_coarse = is_quantized or model.dtype not in EXACT

    def agree(found: torch.Tensor, plain: torch.Tensor, noise: Callable[[], torch.Tensor]) -> bool:
        if float((found - plain).abs().max()) <= most:
            return True
        return is_coarse and differ_by_rounding(found, plain, noise)

    return agree


def families_proven(model: Any) -> bool:
    """Whether prompts read after a stem have the logits of single prompts; probed once a model.

    Two families are read together, whose stems and prompts differ in length.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base not in _families_proven:
        most = model.config.get_text_config().vocab_size

        def ids(step: int, count: int) -> list[int]:
            return [3 + step * i % (most - 3) for i in range(1, count + 1)]

        prompts = [ids(7, 9) + ids(11, 4), ids(7, 9) + ids(13, 2), ids(5, 4) + ids(3, 7)]
        units = [Unit([0, 1], 9), Unit([2], 4)]
        with evaluating(model):

            def read() -> torch.Tensor:
                rows = range(len(prompts))
                found = [read_whole(model, prompts, [row]).logits[0].float() for row in rows]
                return torch.stack(found)

            def again() -> torch.Tensor:
                with rerounded(model):
                    return read()

            plain = read()
            output = model(
                input_ids=torch.tensor(prompts[:1], device=plain.device),
                use_cache=True,
                logits_to_keep=1,
            )
            if proven := may_branch(cache_in(output)):
                found = read_families(model, prompts, units, 0, None).logits.float()
                proven = _agreement(model, plain)(found, plain, again)
        _families_proven[base] = proven
    return _families_proven[base]


def _has_cache(model: Any, ids: list[int]) -> bool:
    """Whether a model returns a cache with keys and values."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
    return holds_keys(cache_in(output))


def pass_limits(
    model: Any, batch_size: int | None, following_tokens: int, is_cached: bool = True
) -> Limits:
    """Return what one pass of a model may hold on its device, within `evaluating`.

    A GPU is filled to `CUDA_PASS_TOKENS` unless `batch_size` is given, and to its free memory.
    """
    if next(model.parameters()).device.type == "cpu":
        return Limits(batch_size or CPU_BATCH, CPU_PASS_TOKENS * torch.get_num_threads())
    if batch_size is not None:
        return Limits(batch_size, sys.maxsize)
    column = bytes_per_column(model, following_tokens, is_cached)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    share = CUDA_SHARE * (free - torch.cuda.memory_allocated())
    cells = max(1, int(share / column))
    return Limits(sys.maxsize, CUDA_PASS_TOKENS, cells, following_tokens, CUDA_ENOUGH_TOKENS)


def bytes_per_column(model: Any, following_tokens: int, is_cached: bool = True) -> int:
    """Return an upper estimate of the bytes that a pass takes for each column of each prompt.

    Keys and values of all layers, as two tokens leave them, three times: those of the stems, a copy
    for each prompt, and the longer copy in which a layer grows. The activations of one layer: three
    times its widest module's and eight hidden sizes. Where more than one token follows, or without
    a cache, the logits, in the model's type and twice in float32, as if all columns had them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    width, device = embedding.weight.element_size(), embedding.weight.device
    output = model(
        input_ids=torch.tensor([[3, 4]], device=device), use_cache=True, logits_to_keep=1
    )
    layers = [layer for layer in getattr(cache_in(output), "layers", ()) if hasattr(layer, "keys")]
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // 2
    linears = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    widest = max((m.out_features for m in linears), default=4 * embedding.weight.shape[1])
    vocabulary = output.logits.shape[-1] if following_tokens > 1 or not is_cached else 0
    active = (3 * widest + 8 * embedding.weight.shape[1]) * width
    return int(3 * cached + active + vocabulary * (width + 8))


def prefill(
    model: Any,
    prompts: Sequence[Ids],
    batch_size: int | None,
    *,
    following_tokens: int,
    families: Sequence[int] | None = None,
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
    batch_size : int or None
        Maximum number of prompts per forward pass; on a CPU `CPU_PASS_TOKENS` may lower it. None:
        `CPU_BATCH` on a CPU, and on a GPU as many as `pass_limits` allows.
    following_tokens : int
        Length of the longest continuation that any of the prompts gets.
    families : sequence of int, optional
        The family of each prompt: those of the same number share the beginning that they have in
        common, where the model's layout allows it.

    Raises
    ------
    ModelError
        If a prompt has a token that the model has no embedding for.
    ValueError
        If a prompt has no tokens, or `batch_size` is below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens")
    check_known(model.config, max((max(prompt) for prompt in prompts), default=0))
    whole = list(range(len(prompts)))
    if not prompts:
        return
    layout = proven_layout(model, max(map(len, prompts)) + following_tokens)
    is_cached = layout not in (WHOLE, ALONE)
    limits = pass_limits(
        model, 1 if layout in (SINGLE, ALONE) else batch_size, following_tokens, is_cached
    )
    if not is_cached:
        for chosen in batches(prompts, [Unit([row]) for row in whole], 0, limits):
            alone = [unit.rows[0] for unit in chosen]
            yield from _fitting(partial(read_whole, model, prompts), alone)
        return
    for rows, prefix in groups(prompts, families) if layout == SHARED else [(whole, [])]:
        longest = max(len(prompts[row]) for row in rows)
        prefix_cache = read_prefix(model, prefix, longest + following_tokens) if prefix else None
        shared_tokens = len(prefix) if prefix_cache is not None else 0
        before: dict[str, Any] = {"prefix_tokens": shared_tokens, "prefix_cache": prefix_cache}
        if layout == SHARED and families is not None and families_proven(model):
            units, rows = stems(prompts, rows, families, shared_tokens)
            for chosen in batches(prompts, units, shared_tokens, limits):
                yield from _fitting(partial(read_families, model, prompts, **before), chosen)
        units = [Unit([row]) for row in rows]
        for chosen in batches(prompts, units, shared_tokens, limits):
            alone = [unit.rows[0] for unit in chosen]
            yield from _fitting(partial(read_batch, model, prompts, **before), alone)


def _fitting(read: Callable[[list[Any]], Prefilled], chosen: list[Any]) -> Iterator[Prefilled]:
    """Read a batch, or its halves one after the other where memory runs out."""
    try:
        found = read(chosen)
    except (RuntimeError, MemoryError) as error:
        if len(chosen) == 1 or not is_out_of_memory(error):
            raise
    else:
        yield found
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(chosen) // 2
    yield from _fitting(read, chosen[:half])
    yield from _fitting(read, chosen[half:])
