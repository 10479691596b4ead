"""Where a received adapter lies in the resident one, and which part of it a visit trains.

Most rules train the whole of the resident adapter. `ffa` and `rolora` train one factor. A site of a
lower rank uses the first ranks and leaves the others zero. `flora` keeps the received stack frozen
in the first ranks, and trains a fresh adapter in the last ones:

    ranks        0 ... stack      ... max_rank      max_rank ... max_rank + rank
    holds        received         zeros             fresh: A drawn by seed and round, B zero
"""

from __future__ import annotations

import numpy as np

from grandrounds.wire import protocol
from grandrounds.wire.adapter import Adapter, Shapes, factor_of

EVERYTHING = slice(None)


def resident_rank(rule: str, rank: int, max_rank: int) -> int:
    """Return the rank of the adapter on the base."""
    return max_rank + rank if rule == "flora" else rank


def trained_ranks(rule: str, rank: int, max_rank: int, site_rank: int) -> slice:
    """Return which ranks a visit trains; all of them for most rules."""
    if rule == "flora":
        return slice(max_rank, max_rank + rank)
    return EVERYTHING if site_rank == rank else slice(0, site_rank)


def of_ranks(name: str, ranks: slice) -> tuple[slice, ...]:
    """Return the index of some ranks in a tensor: rows of A, columns of B."""
    return (ranks,) if factor_of(name) == "A" else (EVERYTHING, ranks)


def place(shapes: Shapes, *parts: tuple[Adapter, int]) -> Adapter:
    """Return tensors of these shapes that hold each part from its first rank on, and zeros.

    Parameters
    ----------
    shapes
        The resident adapter's.
    parts : (adapter, first rank)
        A later part covers an earlier one. A part may lack names.
    """
    if len(parts) == 1 and protocol.shapes_of(parts[0][0]) == dict(shapes):
        return parts[0][0]
    placed = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    for adapter, first in parts:
        ranks = slice(first, first + protocol.rank_of(protocol.shapes_of(adapter)))
        for name, tensor in adapter.items():
            placed[name][of_ranks(name, ranks)] = tensor
    return placed


def take(change: Adapter, factors: str, ranks: slice) -> Adapter:
    """Return the part of a change that was trained, which is what travels up."""
    return {
        name: np.ascontiguousarray(tensor[of_ranks(name, ranks)])
        for name, tensor in change.items()
        if factor_of(name) in factors
    }
