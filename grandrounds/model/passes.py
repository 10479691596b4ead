"""Which prompts are read in the same pass, and how much one pass may hold."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ids = Sequence[int]

MOST_PADDING = 1 / 32
"""Share of the tokens of a pass that may be padding once it has `Limits.enough` of them."""

MIN_SHARED_TOKENS = 8
"""A shorter prefix is not worth a separate pass."""


@dataclass(frozen=True)
class Limits:
    """What one pass may hold; a single prompt may exceed all but the first."""

    prompts: int
    """Prompts."""
    tokens: int
    """Prompts x columns that are read, padding included."""
    cells: int = sys.maxsize
    """Prompts x columns with those read before and those that follow, which the cache holds."""
    following: int = 0
    """Columns that may follow."""
    enough: int = sys.maxsize
    """Tokens read at which a pass takes no more prompts whose padding is not worth it: more than
    `MOST_PADDING` of the tokens read."""

    def hold(self, prompts: int, read_columns: int, before_columns: int) -> bool:
        """Whether a pass holds so many prompts of so many columns."""
        return (
            prompts <= self.prompts
            and prompts * read_columns <= self.tokens
            and prompts * (read_columns + before_columns + self.following) <= self.cells
        )

    def is_full(self, read: int, read_with_more: int, real_with_more: int) -> bool:
        """Whether a pass has enough tokens, and more prompts would be padded too much."""
        padding = read_with_more - real_with_more
        return read >= self.enough and padding > MOST_PADDING * read_with_more


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
    stem = width = count = real = 0
    for unit in units:
        lengths = [len(prompts[row]) - shared_tokens - unit.stem_tokens for row in unit.rows]
        own = unit.stem_tokens + sum(lengths)
        most_stem, most_width = max(stem, unit.stem_tokens), max(width, *lengths)
        more = count + len(unit.rows)
        read = len(chosen) * stem + count * width
        with_more = (len(chosen) + 1) * most_stem + more * most_width
        if chosen and (
            not limits.hold(more, most_width, shared_tokens + most_stem)
            or limits.is_full(read, with_more, real + own)
        ):
            yield chosen
            chosen, more, real = [], len(unit.rows), 0
            most_stem, most_width = unit.stem_tokens, max(lengths)
        chosen.append(unit)
        stem, width, count, real = most_stem, most_width, more, real + own
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
