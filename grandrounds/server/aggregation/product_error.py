"""The error of averaging LoRA factors separately instead of averaging their products.

    e = || sum_i p_i B_i A_i - B_mean A_mean || / || sum_i p_i B_i A_i ||     (Frobenius)

FedAvg on LoRA factors yields the model B_mean A_mean, whereas the mean of the sites' models is
sum_i p_i B_i A_i (Sun et al., FFA-LoRA, ICLR 2024, equation 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.adapter import A, Adapter, B
from grandrounds.wire.low_rank import modules


def measured_modules(names: Sequence[str], cohort: int, most: int = 8) -> list[str]:
    """Return which modules to measure, spread over the depth of the model.

    Few enough that the kept factors of a whole cohort take about the memory of one adapter.
    """
    found = modules(names)
    count = max(1, min(most, len(found) // max(1, cohort)))
    places = np.linspace(0, len(found) - 1, count).round().astype(int)
    return [found[i] for i in dict.fromkeys(places.tolist())]


class ProductError:
    """Keeps the factors of a few modules as replies arrive; never forms a full-size matrix."""

    def __init__(self, adapter: Adapter, modules: Sequence[str]) -> None:
        self._start = {m: (adapter[m + A], adapter[m + B]) for m in modules}
        self._changes: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = {
            m: [] for m in modules
        }
        self._weights: list[int] = []

    def add(self, change: Adapter, weight: int) -> None:
        """Add one site's change, as passed to the aggregation rule."""
        self._weights.append(weight)
        for module, changes in self._changes.items():
            # copies: a view would keep the whole decoded change
            changes.append((change[module + A].copy(), change[module + B].copy()))

    def report(self) -> dict[str, float]:
        """Return both errors for the round's metrics; empty if no module is measured."""
        if not self._start:
            return {}
        return {"product-error": self.result(), "product-error-of-update": self.of_update()}

    def result(self) -> float:
        """Return e over all measured modules together; 0 if the product is zero."""
        error, product, _ = self._norms_squared()
        return float(np.sqrt(max(error, 0.0) / product)) if product > 0 else 0.0

    def of_update(self) -> float:
        """Return the error relative to the round's update; 0 if nothing changed.

        The denominator is || sum_i p_i B_i A_i - B A || with the factors B, A that the sites
        received. Relative to the product, which grows over the rounds, the error would vanish.
        """
        error, _, update = self._norms_squared()
        return float(np.sqrt(max(error, 0.0) / update)) if update > 0 else 0.0

    def _norms_squared(self) -> tuple[float, float, float]:
        """Return the squared norms of the error, of the mean product and of its change."""
        shares = np.array(self._weights) / sum(self._weights)
        mean_product = np.concatenate([shares, [0.0, 0.0]])
        without_mean = np.concatenate([shares, [-1.0, 0.0]])
        without_start = np.concatenate([shares, [0.0, -1.0]])
        error = product = update = 0.0
        for module, changes in self._changes.items():
            start_a, start_b = self._start[module]
            gram_b = factor_gram(start_b, [b for _, b in changes], shares)
            gram_a = factor_gram(start_a.T, [a.T for a, _ in changes], shares)
            products = np.einsum("isjt,isjt->ij", gram_b, gram_a)  # <B_i A_i, B_j A_j>
            error += float(without_mean @ products @ without_mean)
            product += float(mean_product @ products @ mean_product)
            update += float(without_start @ products @ without_start)
        return error, product, update


def factor_gram(
    start: NDArray[np.float32],
    changes: Sequence[NDArray[np.float32]],
    shares: NDArray[np.float64],
    block: int = 256,
) -> NDArray[np.float64]:
    """Return all inner products of the columns of the sites' factors, their mean and the start.

    Parameters
    ----------
    start : array of (features, rank)
        The factor that every site received.
    changes : one array of (features, rank) per site
        Each site's change.
    shares : array of (sites,)
        The sites' weights, which sum to 1.
    block : int
        Features processed at a time, to keep float64 copies small.

    Returns
    -------
    array of (sites + 2, rank, sites + 2, rank)
        The sites, then the mean and the start.
    """
    features, rank = start.shape
    width = (len(changes) + 2) * rank
    gram = np.zeros((width, width))
    for i in range(0, features, block):
        rows = slice(i, i + block)
        received = start[rows, None].astype(np.float64)
        sites = np.stack([c[rows] for c in changes], axis=1) + received
        mean = np.einsum("fsr,s->fr", sites, shares)
        columns = np.concatenate([sites, mean[:, None], received], axis=1).reshape(-1, width)
        gram += columns.T @ columns
    return gram.reshape(len(changes) + 2, rank, len(changes) + 2, rank)
