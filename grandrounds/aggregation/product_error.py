"""How far averaging A and B apart is from averaging what they do: measured, not assumed.

    e = || sum_i p_i B_i A_i - B_mean A_mean || / || sum_i p_i B_i A_i ||     (Frobenius)

FedAvg on LoRA factors makes the model B_mean A_mean, while the mean of the sites' models is
sum_i p_i B_i A_i (Sun et al., FFA-LoRA, ICLR 2024, equation 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.adapter import Adapter

A, B = ".lora_A.weight", ".lora_B.weight"


def measured_modules(names: Sequence[str], cohort: int, most: int = 8) -> list[str]:
    """Return which modules to measure, spread over the depth of the model.

    So few that the factors kept of a whole cohort take no more memory than about one adapter.
    """
    modules = [name.removesuffix(A) for name in names if name.endswith(A)]
    count = max(1, min(most, len(modules) // max(1, cohort)))
    places = np.linspace(0, len(modules) - 1, count).round().astype(int)
    return [modules[i] for i in dict.fromkeys(places.tolist())]


class ProductError:
    """Keeps the factors of a few modules as replies arrive; no full-size matrix is ever formed."""

    def __init__(self, adapter: Adapter, modules: Sequence[str]) -> None:
        self._start = {
            m: (adapter[m + A].astype(np.float64), adapter[m + B].astype(np.float64))
            for m in modules
        }
        self._factors: dict[str, list[tuple[float, NDArray[np.float64], NDArray[np.float64]]]] = {
            m: [] for m in modules
        }

    def add(self, change: Adapter, weight: int) -> None:
        """Add one site's change, as the aggregation rule gets it."""
        for module, (a, b) in self._start.items():
            site_a = a + change[module + A].astype(np.float64)
            site_b = b + change[module + B].astype(np.float64)
            self._factors[module].append((float(weight), site_a, site_b))

    def result(self) -> float:
        """Return the relative error over the measured modules together; 0 where nothing changed."""
        error = norm = 0.0
        for factors in self._factors.values():
            total = sum(weight for weight, _, _ in factors)
            shares = [weight / total for weight, _, _ in factors]
            mean_a = sum(p * a for p, (_, a, _) in zip(shares, factors, strict=True))
            mean_b = sum(p * b for p, (_, _, b) in zip(shares, factors, strict=True))
            lefts = [p * b for p, (_, _, b) in zip(shares, factors, strict=True)]
            rights = [a for _, a, _ in factors]
            norm += product_norm_squared(np.hstack(lefts), np.vstack(rights))
            error += product_norm_squared(
                np.hstack([*lefts, -np.asarray(mean_b)]), np.vstack([*rights, np.asarray(mean_a)])
            )
        return float(np.sqrt(max(error, 0.0) / norm)) if norm > 0 else 0.0


def product_norm_squared(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Return ||left @ right||_F^2 from the two small Gram matrices: trace(L^T L R R^T).

    left is (out, k) and right (k, in) with k = sites times rank.
    """
    return float(np.sum((left.T @ left) * (right @ right.T)))
