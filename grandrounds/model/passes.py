"""Which prompts are read in the same pass, and how much one pass may hold."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Ids = Sequence[int]

MIN_SHARED_TOKENS = 8
"""A shorter prefix is not worth a separate pass."""

CPU_PASS_TOKENS = 1024
"""Maximum number of tokens per CPU thread in one pass, unless a single prompt has more. A few
hundred reach the full rate; with many thousands activations outgrow the CPU's cache: a model of 6 M
parameters took three times as long in passes of 50,000 tokens as in short ones."""

CUDA_PASS_TOKENS = 16_384
"""Maximum number of tokens in one pass on a GPU: enough for its full rate of products, at which one
pass of an 8B base takes half a second."""

CUDA_SHARE = 0.5
"""Share of the free memory of a GPU that a pass may plan to fill."""

CPU_BATCH = 16
"""Prompts per pass on a CPU where the caller sets no number."""


@dataclass(frozen=True)
class Limits:
    """What one pass may hold; a single prompt may exceed all but the first."""

    prompts: int
    """Prompts."""
    tokens: int
    """Prompts x columns that are read, padding included."""
    cells: int = sys.maxsize
    """Prompts x columns with those that were read before, which the key-value cache holds."""

    def hold(self, prompts: int, read_columns: int, before_columns: int) -> bool:
        """Whether a pass holds so many prompts of so many columns."""
        return (
            prompts <= self.prompts
            and prompts * read_columns <= self.tokens
            and prompts * (read_columns + before_columns) <= self.cells
        )


def pass_limits(model: Any, batch_size: int | None, following_tokens: int) -> Limits:
    """Return what one pass of a model may hold on its device.

    A GPU is filled to `CUDA_PASS_TOKENS` unless `batch_size` is given, and to its free memory.
    """
    if next(model.parameters()).device.type == "cpu":
        return Limits(batch_size or CPU_BATCH, CPU_PASS_TOKENS * torch.get_num_threads())
    if batch_size is not None:
        return Limits(batch_size, sys.maxsize)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    share = CUDA_SHARE * (free - torch.cuda.memory_allocated())
    cells = max(1, int(share / bytes_per_column(model, following_tokens)))
    return Limits(sys.maxsize, CUDA_PASS_TOKENS, cells)


def bytes_per_column(model: Any, following_tokens: int) -> float:
    """Return an upper estimate of the bytes that a pass takes for each column of each prompt.

    Keys and values of all layers, three times: those of the stems, a copy for each prompt, and the
    longer copy in which a layer grows. The activations of one layer: three MLP widths and eight
    hidden sizes. The logits of continuations, in the model's type and twice in float32, as if each
    were a column wide; a prompt has more columns than it has following tokens.
    """
    config = model.config.get_text_config()
    hidden, width = config.hidden_size, next(model.parameters()).element_size()
    heads = getattr(config, "num_attention_heads", 1)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    cache = 3 * 2 * config.num_hidden_layers * key_heads * head_size * width
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    logits = config.vocab_size * (width + 8) * (following_tokens > 1)
    return float(cache + (3 * inner + 8 * hidden) * max(width, 2) + logits)


@dataclass(frozen=True)
class Unit:
    """Prompts that are read in the same pass: a family with its stem, or one prompt without."""

    rows: list[int]
    stem_tokens: int = 0
    """Tokens after the shared prefix that all of them start with."""


def batches(
    prompts: Sequence[Ids], units: list[Unit], shared_tokens: int, limits: Limits
) -> Iterator[list[Unit]]:
    """Yield the units in batches, those with the longest prompts first."""
    units.sort(key=lambda unit: -max(len(prompts[row]) for row in unit.rows))
    chosen: list[Unit] = []
    stem = width = count = 0
    for unit in units:
        longest = max(len(prompts[row]) for row in unit.rows) - shared_tokens - unit.stem_tokens
        most_stem, most_width = max(stem, unit.stem_tokens), max(width, longest)
        more = count + len(unit.rows)
        if chosen and not limits.hold(more, most_width, shared_tokens + most_stem):
            yield chosen
            chosen, more, most_stem, most_width = [], len(unit.rows), unit.stem_tokens, longest
        chosen.append(unit)
        stem, width, count = most_stem, most_width, more
    if chosen:
        yield chosen


def stems(
    prompts: Sequence[Ids], rows: list[int], families: Sequence[int], shared_tokens: int
) -> tuple[list[Unit], list[int]]:
    """Return the families with a stem worth a pass, and the rows of all others."""
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(families[row], []).append(row)
    found, others = [], []
    for family in members.values():
        stem = len(shared_prefix([prompts[row] for row in family])) - shared_tokens
        if len(family) > 1 and stem >= MIN_SHARED_TOKENS:
            found.append(Unit(family, stem))
        else:
            others += family
    return found, others


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


def groups(
    prompts: Sequence[Ids], families: Sequence[int] | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return groups of rows with their prefix: those with the most common start, and all others.

    A start that only one family has is no prefix, but its stem.
    """
    starts = {
        row: tuple(prompt[:MIN_SHARED_TOKENS])
        for row, prompt in enumerate(prompts)
        if len(prompt) > MIN_SHARED_TOKENS
    }
    counted = list(starts.values())
    if families is not None:
        counted = [s for _, s in dict.fromkeys((families[r], s) for r, s in starts.items())]
    commonest, times = next(iter(Counter(counted).most_common(1)), (None, 0))
    # A single prompt would share all of its tokens, and a separate pass would save nothing.
    sharing = [row for row, start in starts.items() if times > 1 and start == commonest]
    alone = sorted(set(range(len(prompts))).difference(sharing))
    found = [(sharing, shared_prefix([prompts[row] for row in sharing])), (alone, [])]
    return [(rows, prefix) for rows, prefix in found if rows]
