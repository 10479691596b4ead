"""Whether every number of an array is finite, in one fast pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def all_finite(values: NDArray[np.float32]) -> bool:
    """Return whether no number is infinite or NaN.

    A sum of squares is finite only where all its terms are: squares cannot cancel. It takes one
    read of the values. Where it is not finite (large numbers overflow too) each number is asked.
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return True
    return bool(np.isfinite(flat).all())
