"""Two checks of updates before any rule: a bound on their length, a screen of their direction.

The norm bound survives one site that scales its update to outvote the rest: it moves the mean by
no more than its share times the bound. It does not survive an update of ordinary length into a bad
direction, nor many such sites, nor one patient site over many rounds.

The screen survives a minority of sites that push against the others, as with flipped signs or with
noise. It does not survive an update that agrees with the others in most coordinates and hides its
harm in a few, nor a majority. It is blind to length, so it belongs together with the bound; and
where sites differ much it leaves out honest ones whose data are unlike the others'.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.adapter import Adapter

TINY = 1e-30
"""Below this, squares may have been lost at the lower end of float32."""


def norm(change: Adapter) -> float:
    """Return the L2 norm over all tensors together.

    Each tensor's sum of squares is BLAS's, in float32; where these leave its range, float64's.
    """
    flat = [tensor.reshape(-1) for tensor in change.values()]
    with np.errstate(over="ignore"):
        squared = sum(float(np.dot(x, x)) for x in flat)
    if not TINY < squared < np.inf:
        squared = sum(float(np.sum(x.astype(np.float64) ** 2)) for x in flat)
    return float(np.sqrt(squared))


def norm_bound(change: Adapter, bound: float) -> tuple[Adapter, float]:
    """Return the update, scaled down to a norm of at most `bound`, and the norm it had.

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

    Every other site has one vote, however long its update. An update without a direction (zero),
    or others whose directions cancel, give 0.
    """
    partitions = sorted(changes)
    gram = _inner_products([changes[p] for p in partitions])
    lengths = np.sqrt(np.diag(gram))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    gram = gram * np.outer(scale, scale)  # of the unit vectors
    to_others = gram.sum(axis=1) - np.diag(gram)
    others_squared = gram.sum() - 2 * gram.sum(axis=1) + np.diag(gram)
    # a sum of k unit vectors that cancel is known to about k rounding errors, not better
    noise = 1e-12 * len(partitions) ** 2
    others = np.sqrt(np.where(others_squared > noise, others_squared, np.inf))
    return dict(zip(partitions, (to_others / others).tolist(), strict=True))


def screen(changes: Mapping[int, Adapter], min_cosine: float) -> dict[int, float]:
    """Return the sites whose update shall be left out, each with its cosine below `min_cosine`.

    Of fewer than three updates none is left out: of two that disagree nobody can say which.

    Parameters
    ----------
    changes
        Partition → update, all relative to the same adapter.
    min_cosine : float
        From -1 (leave nobody out) to 1; 0 leaves out what points away from the others.
    """
    if len(changes) < 3:
        return {}
    return {p: cosine for p, cosine in cosines(changes).items() if cosine < min_cosine}


def _inner_products(changes: list[Adapter]) -> NDArray[np.float64]:
    """Return all inner products in float64, tensor by tensor, so that little is held at once."""
    products = np.zeros((len(changes), len(changes)))
    for name in changes[0] if changes else ():
        rows = np.stack([change[name].ravel() for change in changes]).astype(np.float64)
        products += rows @ rows.T
    return products
