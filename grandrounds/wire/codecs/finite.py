"""A fast check that every value of an array is finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def all_finite(values: NDArray[np.float32]) -> bool:
    """Return whether no value is infinite or NaN.

    A sum of squares is finite only if all its terms are, since squares cannot cancel, and takes a
    single read. If it is not finite (large values overflow too), every value is checked.
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return True
    return bool(np.isfinite(flat).all())
