"""What a model gives away by itself: whole answers, and how far up a true one is in a closed list.

A canary's value was drawn from a list that is known. A model that never saw it has no better reason
for the true value than for any other, so matches among the canaries that were left out are chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.study.audit.membership import clopper_pearson


@dataclass(frozen=True)
class Extraction:
    """What was extracted of some canaries."""

    matches: int
    """Greedy answers that are exactly the true one."""
    number: int
    mean_exposure: float
    """Mean of log2(length of the list) - log2(rank): 0 to log2(length); by chance about 1.3 of a
    list of 24."""
    first: int
    """Canaries whose true value is the likeliest of the list."""

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "matches": self.matches,
            "canaries": self.number,
            "share-interval": list(clopper_pearson(self.matches, self.number)),
            "mean-exposure-bits": self.mean_exposure,
            "ranked-first": self.first,
        }


def exposure(rank: int, number: int) -> float:
    """Return the exposure in bits: Carlini et al., The secret sharer, 2019, definition 5.

    Parameters
    ----------
    rank : int
        Position of the true value among all of the list by likelihood, from 1: exact, not sampled.
    """
    return math.log2(number) - math.log2(rank)


def rank_of(scores: Sequence[float], true: int) -> int:
    """Return the rank of the true value, from 1; ties count against the attack."""
    return sum(score >= scores[true] for score in scores)


def extraction(
    greedy: Sequence[bool], ranks: Sequence[int], list_length: int, chosen: Sequence[bool]
) -> Extraction:
    """Return what was extracted of the chosen canaries.

    Parameters
    ----------
    greedy
        Whether each canary's greedy answer is exactly the true one.
    ranks
        Rank of each canary's true value, from 1.
    list_length : int
        Length of the closed list.
    """
    found = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    bits = [exposure(ranks[i], list_length) for i in found]
    return Extraction(
        matches=sum(greedy[i] for i in found),
        number=len(found),
        mean_exposure=sum(bits) / len(bits),
        first=sum(ranks[i] == 1 for i in found),
    )
