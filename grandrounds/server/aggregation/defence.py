"""Defences before any aggregation rule: a bound on norms, screens of directions and of spread.

The norm bound withstands a site that scales up its update to outvote the rest: the site moves the
mean by at most its share times the bound. It does not withstand an update of normal length in a
harmful direction, many such sites, or one patient site over many rounds. Under `fedexp` the mean
is then multiplied by up to half the number of updates.

The screen withstands a minority of sites that push against the others, for example with flipped
signs or noise. It does not withstand an update that agrees with the others in most coordinates and
hides its harm in a few, or a hostile majority. It ignores length, so use it together with the
bound. Where sites are very heterogeneous, it rejects honest ones with unusual data.

The screen of spread withstands fewer than a third of the sites where they agree with one another
more than honest ones do, or lie farther out. It does not withstand hostile updates that are as long
as the honest ones and as different from one another. It rejects honest sites with data that only
a few share, if these data move the adapter by much.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.adapter import Adapter

TINY = 1e-30
"""Below this, squares may have underflowed in float32."""


ROUNDING = 1e-9
"""Variance below this share of the squared norms may be rounding."""


def norm(change: Adapter) -> float:
    """Return the L2 norm over all tensors together.

    Sums of squares use BLAS in float32, or float64 if they leave its range.
    """
    flat = [tensor.reshape(-1) for tensor in change.values()]
    with np.errstate(over="ignore"):
        squared = sum(float(np.dot(x, x)) for x in flat)
    if not TINY < squared < np.inf:
        squared = sum(float(np.sum(x.astype(np.float64) ** 2)) for x in flat)
    return float(np.sqrt(squared))


def norm_bound(change: Adapter, bound: float) -> tuple[Adapter, float]:
    """Scale an update down to a norm of at most `bound`; return it and its original norm.

    d / max(1, |d| / bound): Sun et al., Can You Really Backdoor Federated Learning? (2019), the
    section on norm thresholding.

    Raises
    ------
    ValueError
        If the bound is not above 0.
    """
    if not bound > 0:
        raise ValueError(f"a norm bound must be above 0, not {bound}")
    length = norm(change)
    if length <= bound:
        return change, length
    scale = np.float64(bound / length)
    return {name: (x * scale).astype(np.float32) for name, x in change.items()}, length


def cosines(changes: Mapping[int, Adapter]) -> dict[int, float]:
    """Return the cosine of each update with the mean of the others' unit vectors.

    Every other site has one vote, whatever the length of its update. The cosine is 0 for a zero
    update, or if the others' directions cancel.
    """
    partitions = sorted(changes)
    gram = inner_products([changes[p] for p in partitions])
    lengths = np.sqrt(np.diag(gram))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    gram = gram * np.outer(scale, scale)  # inner products of the unit vectors
    to_others = gram.sum(axis=1) - np.diag(gram)
    others_squared = gram.sum() - 2 * gram.sum(axis=1) + np.diag(gram)
    # a sum of k unit vectors that cancel is accurate to about k rounding errors
    noise = 1e-12 * len(partitions) ** 2
    others = np.sqrt(np.where(others_squared > noise, others_squared, np.inf))
    return dict(zip(partitions, (to_others / others).tolist(), strict=True))


def screen(changes: Mapping[int, Adapter], min_cosine: float) -> dict[int, float]:
    """Return the sites to reject, each with its cosine, which is below `min_cosine`.

    With fewer than three updates, none is rejected: if two disagree, either may be right.

    Parameters
    ----------
    changes
        Partition → update, all relative to the same adapter.
    min_cosine : float
        From -1 (reject none) to 1; 0 rejects updates that point away from the others.
    """
    if len(changes) < 3:
        return {}
    return {p: cosine for p, cosine in cosines(changes).items() if cosine < min_cosine}


def outlying(changes: Mapping[int, Adapter], largest_spread: float) -> dict[int, float]:
    """Return the sites to reject, each with the spread for which it was rejected.

    Let the spread be the largest eigenvalue of the covariance of the updates, relative to the
    median of the eigenvalues above 0: 1 if they vary by as much in every direction. While it
    exceeds `largest_spread`, the update that lies farthest along the largest eigenvector is
    rejected, up to fewer than a third of all. This is the filter of Diakonikolas et al., Sever: A
    Robust Meta-Algorithm for Stochastic Optimization (ICML 2019), which scores by the squared
    projection on that eigenvector, with this threshold in place of a random one and one update at a
    time. With fewer than four updates, none is rejected.

    Parameters
    ----------
    changes
        Partition → update, all relative to the same adapter.
    largest_spread : float
        At least 1.
    """
    partitions = sorted(changes)
    gram = inner_products([changes[p] for p in partitions])
    rejected: dict[int, float] = {}
    for _ in range((len(partitions) - 1) // 3):
        left = [i for i, p in enumerate(partitions) if p not in rejected]
        centered = np.eye(len(left)) - 1 / len(left)
        values, vectors = np.linalg.eigh(centered @ gram[np.ix_(left, left)] @ centered)
        largest, median = float(values[-1]), float(np.median(values[1:]))  # the first one is 0
        if largest <= largest_spread * max(median, 0.0) or largest <= ROUNDING * np.trace(gram):
            break
        farthest = partitions[left[int(np.argmax(vectors[:, -1] ** 2))]]
        rejected[farthest] = largest / median if median > 0 else np.inf
    return rejected


def inner_products(changes: list[Adapter]) -> NDArray[np.float64]:
    """Return all inner products in float64, computed tensor by tensor to save memory."""
    products = np.zeros((len(changes), len(changes)))
    for name in changes[0] if changes else ():
        rows = np.stack([change[name].ravel() for change in changes]).astype(np.float64)
        products += rows @ rows.T
    return products
