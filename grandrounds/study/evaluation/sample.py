"""Which items of a benchmark are asked under `--limit`: a seeded sample, stratified by answer.

Published test sets come sorted. Of PubMedQA's first 300 rows 276 have the answer yes, so that the
first N would measure how often a model says yes.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

SEED = 0
"""Seed of every sample, so that all models and all resumed evaluations answer the same items."""

METHOD = f"stratified by answer, seed {SEED}"
"""How a sample is drawn, in result files."""


def stratified_sample(strata: Sequence[Hashable], count: int) -> list[int]:
    """Return `count` positions, ascending, with the strata in the proportions of the whole.

    Each stratum gets its proportional share, rounded by largest remainder. The positions within a
    stratum are the first of one seeded order, so that a larger sample mostly extends a smaller one.

    Parameters
    ----------
    strata
        The stratum of each position.
    count : int
        Size of the sample, at least 0; all positions if there are fewer.
    """
    if count >= len(strata):
        return list(range(len(strata)))
    members: dict[Hashable, list[int]] = {}
    for position, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(position)
    names = sorted(members, key=repr)
    shares = {name: divmod(count * len(members[name]), len(strata)) for name in names}
    left = count - sum(whole for whole, _ in shares.values())
    by_remainder = sorted(names, key=lambda name: -shares[name][1])
    extra = set(by_remainder[:left])
    chosen: list[int] = []
    for name in names:
        order = members[name][:]
        random.Random(f"{SEED} {name!r}").shuffle(order)
        chosen += order[: shares[name][0] + (name in extra)]
    return sorted(chosen)
