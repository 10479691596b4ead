"""Which tensors travel in a round, down and up: asked by the plan, the server and the sites alike.

The shapes given are always those of the whole adapter at its configured rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.strategies import STRATEGIES
from grandrounds.wire.adapter import Adapter, Shapes, factor_of


def shapes_down(rule: str, shapes: Shapes, rank: int) -> Shapes:
    """Return the tensors that a site receives.

    Parameters
    ----------
    rank : int
        Rank at which the adapter travels: the site's own (`site_rank`), or under `flora` that of
        the stack.
    """
    return at_rank(of_factors(shapes, STRATEGIES[rule].sends), rank)


def shapes_up(rule: str, shapes: Shapes, round_number: int, rank: int) -> Shapes:
    """Return the tensors that a site sends back in a round.

    Parameters
    ----------
    rank : int
        Rank that the site trains.
    """
    return at_rank(of_factors(shapes, STRATEGIES[rule].trained(round_number)), rank)


def of_factors(shapes: Shapes, factors: str) -> Shapes:
    """Return the tensors that are one of the factors `A`, `B` or `AB`."""
    return {name: shape for name, shape in shapes.items() if factor_of(name) in factors}


def at_rank(shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes with another rank."""
    return {
        name: (rank, *shape[1:]) if factor_of(name) == "A" else (*shape[:-1], rank)
        for name, shape in shapes.items()
    }


def rank_of(tensors: Shapes) -> int:
    """Return the rank of an adapter's tensors."""
    name, shape = next(iter(tensors.items()))
    return shape[0] if factor_of(name) == "A" else shape[-1]


def shapes_of(adapter: Adapter) -> Shapes:
    """Return the shapes of an adapter's tensors."""
    return {name: tensor.shape for name, tensor in adapter.items()}


def site_rank(site_ranks: Sequence[int], partition: int, rank: int) -> int:
    """Return the rank that a site trains: its entry of the list, which repeats, or `rank`."""
    return site_ranks[partition % len(site_ranks)] if site_ranks else rank


def stacked_rank(rank: int, max_rank: int, cohort: int, round_number: int) -> int:
    """Return `flora`'s rank on the way down in a round in which nothing failed so far.

    The untrained adapter has the rank that sites train. It changes nothing, so the first stack
    holds the cohort's adapters alone; each round adds as many ranks, up to `max_rank`.
    """
    if round_number <= 1:
        return rank
    return min(max_rank, (round_number - 1) * cohort * rank)


def flatten(tensors: Adapter) -> NDArray[np.float32]:
    """Return all numbers of the tensors as one vector, in the order of the mapping."""
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([tensor.ravel() for tensor in tensors.values()])


def unflatten(vector: NDArray[np.float32], shapes: Shapes) -> Adapter:
    """Return the tensors, views of the vector, that `flatten` strung together."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape))
        tensors[name] = vector[start:stop].reshape(shape)
        start = stop
    return tensors


def count(shapes: Shapes) -> int:
    """Return how many numbers tensors of these shapes have."""
    return sum(int(np.prod(shape)) for shape in shapes.values())
