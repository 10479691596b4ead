"""Best products of low rank and their factors, against dense SVDs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from grandrounds.wire.adapter import Adapter
from grandrounds.wire.low_rank import (
    FLOOR,
    Gauge,
    Term,
    best_product,
    factors,
    modules,
    relative_error,
    truncate,
)
from tests.server.aggregation.adapters import LAYERS, product, random_adapter

GAUGES: tuple[Gauge, ...] = ("nearest", "balanced")


def random_terms(
    seed: int, sites: int = 3, rank: int = 4, out: int = 30, into: int = 19
) -> list[Term]:
    rng = np.random.default_rng(seed)
    return [
        (float(rng.normal()), rng.normal(size=(out, rank)), rng.normal(size=(rank, into)))
        for _ in range(sites)
    ]


def dense(terms: list[Term]) -> Any:
    return np.sum([c * b.astype(float) @ a.astype(float) for c, b, a in terms], axis=0)


def best_dense(matrix: np.ndarray, rank: int) -> Any:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("rank", [1, 4, 7, 12])
@pytest.mark.parametrize(("out", "into"), [(30, 19), (9, 40), (5, 6)])
def test_the_best_product_is_that_of_the_dense_svd(rank: int, out: int, into: int) -> None:
    """Also where the columns of all sites together are more than the layer is wide."""
    terms = random_terms(1, out=out, into=into)
    best = best_product(terms, rank)
    matrix = dense(terms)
    assert np.allclose(best.left @ best.right, best_dense(matrix, rank), atol=1e-10)
    error = np.linalg.norm(matrix - best_dense(matrix, rank))
    assert np.sqrt(best.error_squared) == pytest.approx(error, abs=1e-10)
    assert best.norm_squared == pytest.approx(np.sum(matrix**2))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("rank", [2, 4, 12])
def test_factors_multiply_to_the_best_product_in_every_gauge(gauge: Gauge, rank: int) -> None:
    terms = random_terms(2)
    anchor = np.random.default_rng(3).normal(size=(rank, 19))
    a, b = factors(best_product(terms, rank), rank, anchor, gauge)
    assert (a.shape, b.shape) == ((rank, 19), (30, rank))
    assert a.dtype == b.dtype == np.float32
    expected = best_dense(dense(terms), rank)
    scale = np.abs(expected).max()
    assert np.allclose(b.astype(float) @ a, expected, atol=1e-5 * scale)


def test_the_balanced_gauge_has_the_same_singular_values_on_both_sides() -> None:
    best = best_product(random_terms(4), 4)
    a, b = factors(best, 4, np.zeros((4, 19)), "balanced")
    roots = np.sqrt(best.singular_values)
    assert np.allclose(np.linalg.svd(a, compute_uv=False), roots, rtol=1e-5)
    assert np.allclose(np.linalg.svd(b, compute_uv=False), roots, rtol=1e-5)


def test_the_nearest_gauge_gives_back_factors_that_are_their_own_anchor() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(4, 19)), rng.normal(size=(30, 4))
    near_a, near_b = factors(best_product([(1.0, b, a)], 4), 4, a)
    assert np.allclose(near_a, a, atol=1e-6)
    assert np.allclose(near_b, b, atol=1e-6)


def test_the_nearest_gauge_is_the_projection_of_the_anchor() -> None:
    """Any other A with rows in the same space is farther from the anchor."""
    rng = np.random.default_rng(6)
    best = best_product(random_terms(6), 4)
    anchor = best.right + 0.1 * rng.normal(size=(4, 19))
    a, _ = factors(best, 4, anchor)
    assert np.allclose(a, anchor @ best.right.T @ best.right, atol=1e-6)
    distance = np.linalg.norm(a - anchor)
    for _ in range(20):
        other = a + 0.01 * rng.normal(size=(4, 4)) @ best.right
        assert np.linalg.norm(other - anchor) > distance


@pytest.mark.parametrize("anchor_scale", [0.0, 1e-12, 1.0])
def test_an_anchor_that_misses_the_product_leaves_the_product_exact_and_b_bounded(
    anchor_scale: float,
) -> None:
    """The anchor's rows are orthogonal to three of the four directions, or it is zero."""
    best = best_product(random_terms(7), 4)
    anchor = anchor_scale * np.random.default_rng(7).normal(size=(4, 1)) * best.right[:1]
    a, b = factors(best, 4, anchor)
    expected = best.left @ best.right
    assert np.allclose(b.astype(float) @ a, expected, rtol=1e-4, atol=1e-4)
    sizes = np.linalg.svd(a.astype(float), compute_uv=False)
    assert sizes[-1] == pytest.approx(sizes[0] * (FLOOR if anchor_scale else 1), rel=1e-4)


@pytest.mark.parametrize("gauge", GAUGES)
def test_no_direction_is_dead_where_the_product_has_a_lower_rank(gauge: Gauge) -> None:
    """A product of rank 1 in factors of rank 4: three rows of A continue along the anchor, with B
    zero, so that B has a gradient there."""
    rng = np.random.default_rng(8)
    a = rng.normal(size=(4, 19))
    b = np.zeros((30, 4))
    b[:, 0] = rng.normal(size=30)
    new_a, new_b = factors(best_product([(1.0, b, a)], 4), 4, a, gauge)
    assert np.allclose(new_b.astype(float) @ new_a, b @ a, atol=1e-5)
    assert np.linalg.matrix_rank(new_a) == 4
    assert np.linalg.svd(new_a, compute_uv=False)[-1] > 0.5


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_zero_product_keeps_the_space_of_the_anchor(gauge: Gauge) -> None:
    a = np.random.default_rng(9).normal(size=(4, 19))
    new_a, new_b = factors(best_product([(1.0, np.zeros((30, 4)), a)], 4), 4, a, gauge)
    assert not new_b.any()
    projection = np.linalg.pinv(a) @ a
    assert np.allclose(new_a @ projection, new_a, atol=1e-6)
    assert np.linalg.matrix_rank(new_a) == 4


def test_a_module_narrower_than_the_rank_is_padded_with_zeros() -> None:
    rng = np.random.default_rng(10)
    terms: list[Term] = [(1.0, rng.normal(size=(3, 8)), rng.normal(size=(8, 2)))]
    for gauge in GAUGES:
        a, b = factors(best_product(terms, 8), 8, terms[0][2], gauge)
        assert (a.shape, b.shape) == ((8, 2), (3, 8))
        assert np.allclose(b.astype(float) @ a, dense(terms), atol=1e-5)


def test_no_full_matrix_is_formed() -> None:
    """40,000 x 30,000 would be 9.6 GB in float64; the factors of three sites are 7 MB."""
    rng = np.random.default_rng(11)
    terms: list[Term] = [
        (1 / 3, rng.normal(size=(40_000, 4)), rng.normal(size=(4, 30_000))) for _ in range(3)
    ]
    tracemalloc.start()
    a, b = factors(best_product(terms, 4), 4, terms[0][2])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 60e6
    assert (a.shape, b.shape) == ((4, 30_000), (40_000, 4))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncate_keeps_the_top_directions(gauge: Gauge, rank: int) -> None:
    adapter = random_adapter(np.random.default_rng(12))
    lower = truncate(adapter, rank, gauge)
    assert list(lower) == list(adapter)
    for layer in LAYERS:
        assert lower[f"{layer}.lora_A.weight"].shape[0] == rank
        assert np.allclose(
            product(lower, layer), best_dense(product(adapter, layer), rank), atol=2e-5
        )


def test_truncate_is_exact_where_the_product_has_that_rank() -> None:
    rng = np.random.default_rng(13)
    adapter = random_adapter(rng)
    for layer in LAYERS:
        b = adapter[f"{layer}.lora_B.weight"]
        b[:, 2:] = b[:, :2] @ rng.normal(size=(2, 2)).astype(np.float32)
    lower = truncate(adapter, 2)
    for layer in LAYERS:
        assert np.allclose(product(lower, layer), product(adapter, layer), atol=2e-5)


def test_truncate_leaves_an_adapter_of_that_rank_as_it_is() -> None:
    adapter = random_adapter(np.random.default_rng(14))
    for rank in (4, 9):
        lower = truncate(adapter, rank)
        assert all(lower[name] is adapter[name] for name in adapter)


def test_a_fresh_adapter_truncated_can_still_be_trained() -> None:
    """B is zero; A keeps its strongest directions, at their length."""
    adapter: Adapter = random_adapter(np.random.default_rng(15))
    for name in adapter:
        if "lora_B" in name:
            adapter[name][:] = 0
    lower = truncate(adapter, 2)
    for layer in LAYERS:
        a = lower[f"{layer}.lora_A.weight"]
        strongest = np.linalg.svd(adapter[f"{layer}.lora_A.weight"], compute_uv=False)[:2]
        assert np.allclose(np.linalg.svd(a, compute_uv=False), strongest, rtol=1e-5)
        assert not lower[f"{layer}.lora_B.weight"].any()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        truncate({}, 0)


def test_the_relative_error_is_over_all_modules_together() -> None:
    """Products diag(3, 4) and diag(12, 0) cut to rank 1 lose 3: 3 / sqrt(9 + 16 + 144) = 3/13."""
    best = [best_product([(1.0, np.eye(2), np.diag(d))], 1) for d in ([3.0, 4.0], [12.0, 0.0])]
    assert relative_error(best) == pytest.approx(3 / 13)
    assert relative_error([best_product([(1.0, np.zeros((2, 2)), np.eye(2))], 1)]) == 0.0


def test_modules_are_named_in_their_order() -> None:
    names = ["b.lora_A.weight", "b.lora_B.weight", "a.lora_A.weight", "a.lora_B.weight"]
    assert modules(names) == ["b", "a"]
