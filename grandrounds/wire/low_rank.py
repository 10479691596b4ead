"""The best low-rank approximation of a sum of factor products, without forming the full matrix.

P = sum_j c_j B_j A_j has shape (out, in) and at most rank K, the number of columns of all B_j
together. With L = [c_1 B_1, c_2 B_2, ...] (out, K), R = [A_1; A_2; ...] (K, in) and the QR
decompositions L = Q_L T_L and R^T = Q_R T_R, the singular values of P are those of the small core
T_L T_R^T (K x K), and its right singular vectors are those of the core rotated back by Q_R. The
first r give the best approximation of rank r (Eckart & Young, 1936). The largest arrays are
(out, K) and (in, K). Everything is float64.

The factors of P_r are determined only up to an invertible matrix: (B M^-1)(M A). AdamW's next steps
start from the factors and depend on this choice, the gauge:

`balanced`  B = U sqrt(S), A = sqrt(S) V^T: both factors have the same singular values.
`nearest`   A = Z V^T V, where Z, the anchor, is usually the mean of the sites' A. Among the
            matrices whose rows lie in the row space of P_r it is the nearest to Z, and
            B = U S (Z V)^-1. Singular values of Z V below `FLOOR` of the largest are raised to
            that, so that B stays bounded; the product stays exact.
`orthonormal` B = U S, A = V^T: the rows of A are orthonormal.

Where P has a lower rank than requested, the remaining rows of A continue along the anchor and B is
zero there: if both factors were zero, no gradient could ever reach them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.adapter import A, Adapter, B, rank_index

FLOOR = 0.05
"""Smallest singular value of an A of the nearest gauge, relative to its largest."""

NOISE = float(np.finfo(np.float32).eps)
"""Singular values below this fraction of the largest are rounding error of float32 factors."""

Gauge = Literal["nearest", "balanced", "orthonormal"]

Matrix = NDArray[np.float64]

Term = tuple[float, NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
"""(c, B, A): c B A."""


@dataclass(frozen=True)
class BestProduct:
    """The best approximation of P at a given rank: `left @ right`."""

    left: Matrix
    """U S: (out, found), where found is at most the requested rank."""
    right: Matrix
    """V^T: (found, in), rows orthonormal."""
    singular_values: Matrix
    """(found,), descending."""
    norm_squared: float
    """||P||_F^2."""
    error_squared: float
    """||P - P_r||_F^2."""


def modules(names: Iterable[str]) -> list[str]:
    """Return the names of the adapted modules, in their order."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def best_product(terms: Sequence[Term], rank: int) -> BestProduct:
    """Return the best approximation of rank `rank` to the sum of the terms."""
    right = np.concatenate([a for _, _, a in terms]).astype(np.float64)  # (K, in)
    left = np.concatenate([c * b.astype(np.float64) for c, b, _ in terms], axis=1)  # (out, K)
    basis, turned = np.linalg.qr(right.T)  # (in, k), (k, K)
    core = np.linalg.qr(left, mode="r") @ turned.T
    _, sizes, directions = np.linalg.svd(core, full_matrices=False)
    found = min(rank, int(np.count_nonzero(sizes > NOISE * sizes[0])))
    rows = directions[:found] @ basis.T
    return BestProduct(
        left=left @ (right @ rows.T),
        right=rows,
        singular_values=sizes[:found],
        norm_squared=float(np.sum(sizes**2)),
        error_squared=float(np.sum(sizes[found:] ** 2)),
    )


def factors(
    best: BestProduct, rank: int, anchor: NDArray[np.floating[Any]], gauge: Gauge = "nearest"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return A (rank, in) and B (out, rank), whose product is `best`, in a gauge.

    Parameters
    ----------
    best
        A product of at most this rank.
    rank : int
        Rows of A; at most those of the anchor for the gauge `nearest`.
    anchor : array of (rows, in)
        What A should be close to; with more rows than `rank`, only up to a rotation.
    gauge : {"nearest", "balanced", "orthonormal"}
        See the module's docstring.
    """
    found = len(best.right)
    anchor = anchor.astype(np.float64)
    sizes, more = np.zeros(0), np.zeros((0, anchor.shape[1]))
    if found < rank:
        rest = anchor - anchor @ best.right.T @ best.right
        _, sizes, more = np.linalg.svd(rest, full_matrices=False)
        sizes, more = sizes[: rank - found], more[: rank - found]
    if gauge == "balanced":
        roots = np.sqrt(best.singular_values)
        a = np.concatenate([roots[:, None] * best.right, sizes[:, None] * more])
        b = best.left / roots
    elif gauge == "orthonormal":
        a, b = np.concatenate([best.right, more]), best.left
    else:
        rows = np.concatenate([best.right, more])
        turn, scales, back = np.linalg.svd(anchor @ rows.T, full_matrices=False)
        scales = np.maximum(scales, FLOOR * scales[0]) if scales[0] else np.ones_like(scales)
        if len(anchor) != rank:
            turn = np.eye(rank, len(scales))
        a = turn @ (scales[:, None] * (back @ rows))
        b = best.left @ back[:, :found].T / scales @ turn.T
    padded_a, padded_b = np.zeros((rank, a.shape[1])), np.zeros((len(b), rank))
    padded_a[: len(a)], padded_b[:, : b.shape[1]] = a, b
    return padded_a.astype(np.float32), padded_b.astype(np.float32)


def truncate(adapter: Adapter, rank: int, gauge: Gauge = "nearest") -> Adapter:
    """Return the top `rank` singular directions of each module's product, as factors of that rank.

    What a site of lower rank receives (FlexLoRA: Bai et al., 2024). Exact if the product has at
    most this rank; where B is zero, A keeps its strongest directions. The update is scaled
    by alpha / r outside B A, so alpha / r must be the same at all ranks.

    An adapter of this rank or less is returned unchanged.

    Raises
    ------
    ValueError
        If the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"a rank must be at least 1, not {rank}")
    out = dict(adapter)
    for module in modules(adapter):
        a, b = adapter[module + A], adapter[module + B]
        if rank < len(a):
            out[module + A], out[module + B] = factors(
                best_product([(1.0, b, a)], rank), rank, a, gauge
            )
    return out


def cut(adapter: Adapter, rank: int) -> Adapter:
    """Return the first ranks of an adapter: what a site of lower rank receives under HetLoRA."""
    return {
        name: np.ascontiguousarray(tensor[rank_index(name, slice(0, rank))])
        for name, tensor in adapter.items()
    }


def relative_error(best: Sequence[BestProduct]) -> float:
    """Return ||P - P_r||_F / ||P||_F over all modules together; 0 where P is zero."""
    norm_squared = sum(product.norm_squared for product in best)
    error_squared = sum(product.error_squared for product in best)
    return float(np.sqrt(error_squared / norm_squared)) if norm_squared else 0.0
