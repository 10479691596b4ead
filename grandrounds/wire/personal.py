"""Personal adapters: how a site's own training is weighted against the federated adapter.

Nothing of them travels but the message that asks for one, and the figures of the reply.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grandrounds.wire.adapter import Adapter, factor_of

PERSONAL = "train.personal"
"""Kind of message after the last round: make the site's own adapter, and keep it."""

PARTS = "sites/parts"
"""Folder of the run directory of a rehearsal: what sites keep of their own, a file for each
visit."""

WEIGHT = "weight"
"""Metric of the reply: the weight of the site's own training, from 0 to 1."""

FEDERATED_NLL, FEDERATED_LOSS = "federated-nll-sum", "federated-held-out-loss"
"""Metrics of the reply: `nll-sum` and `held-out-loss` of the received adapter, on the same
examples."""


def moved(start: Adapter, trained: Adapter, weight: float) -> Adapter:
    """Return the adapter on the line from one to another: start + weight (trained - start).

    Interpolation in the space of weights between a model and its fine-tuned copy, as in WiSE-FT
    (Wortsman et al., 2022), here of the factors A and B.

    Parameters
    ----------
    start, trained
        Adapters with the same tensors.
    weight : float
        From 0, the start to the bit, to 1, the trained one to the bit.
    """
    if weight in (0.0, 1.0):
        return trained if weight else start
    step = np.float32(weight)
    return {name: tensor + step * (trained[name] - tensor) for name, tensor in start.items()}


def side_by_side(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Return one adapter whose product is the weighted sum of the parts' products.

    sum_j c_j B_j A_j = [c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...]: the ranks add up, and nothing is
    approximated, while the mean of the factors is not the mean of the products. What B A is scaled
    by must be the same for the sum as for each part.

    Parameters
    ----------
    parts : (adapter, c)
        Adapters of the same modules, of any ranks; none with DoRA's magnitudes.
    """
    joined = {}
    for name in parts[0][0]:
        axis = 0 if factor_of(name) == "A" else 1  # A: (rank, in), B: (out, rank)
        tensors = [
            part[name] if axis == 0 else np.float32(weight) * part[name] for part, weight in parts
        ]
        joined[name] = np.concatenate(tensors, axis=axis)
    return joined
