"""The rule `product` against dense matrices, for equal sites, lossy codecs and lower ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grandrounds.server.aggregation.product import Product, distinct_starts
from grandrounds.server.aggregation.replies import Reply
from grandrounds.wire.adapter import Adapter
from grandrounds.wire.low_rank import Gauge, truncate
from tests.server.aggregation.adapters import LAYERS, distance, play, plus, product, random_adapter

Visit = tuple[Adapter, Adapter, int]
"""(received, change, weight)."""


def dense_mean(adapter: Adapter, visits: list[Visit], layer: str) -> NDArray[np.float64]:
    """Return B A + sum_i p_i (B_i A_i - ^B_i ^A_i)."""
    total = sum(weight for *_, weight in visits)
    mean = product(adapter, layer)
    for received, change, weight in visits:
        moved = product(plus(received, change), layer) - product(received, layer)
        mean = mean + weight / total * moved
    return mean


def visit(rule: Product, adapter: Adapter, visits: list[Visit]) -> Adapter:
    rule.begin(1, adapter)
    for partition, (received, change, weight) in enumerate(visits):
        rule.add(partition, received, change, weight)
    return rule.result()


def best_dense(matrix: np.ndarray, rank: int) -> Any:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def visits_of(kind: str, seed: int = 1) -> tuple[Adapter, list[Visit]]:
    """Return three visits whose sites received what `kind` says."""
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng)
    received: list[Adapter] = [adapter, adapter, adapter]
    if kind == "equal copies":
        received = [{n: x.copy() for n, x in adapter.items()} for _ in range(3)]
    elif kind == "lossy":
        received[1] = received[2] = {n: np.round(x, 2) for n, x in adapter.items()}
    elif kind == "lower ranks":
        received = [adapter, truncate(adapter, 2), truncate(adapter, 1)]
    changes = [
        {n: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for n, x in r.items()}
        for r in received
    ]
    return adapter, list(zip(received, changes, (3, 10, 5), strict=True))


@pytest.mark.parametrize("gauge", ["nearest", "balanced"])
@pytest.mark.parametrize("kind", ["the adapter", "equal copies", "lossy", "lower ranks"])
def test_the_result_is_the_best_product_of_the_mean_model(kind: str, gauge: Gauge) -> None:
    adapter, visits = visits_of(kind)
    rule = Product(gauge)
    result = visit(rule, adapter, visits)
    error = norm = 0.0
    for layer in LAYERS:
        mean = dense_mean(adapter, visits, layer)
        best = best_dense(mean, 4)
        assert np.allclose(product(result, layer), best, atol=3e-5 * np.abs(best).max())
        error += float(np.sum((mean - best) ** 2))
        norm += float(np.sum(mean**2))
    expected = (error / norm) ** 0.5
    assert rule.report()["truncation-error"] == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-4


@pytest.mark.parametrize("kind", ["the adapter", "equal copies"])
def test_where_all_received_the_adapter_itself_it_is_the_mean_of_the_models(kind: str) -> None:
    """B A cancels, by whole numbers: no start is left over."""
    adapter, visits = visits_of(kind)
    assert distinct_starts(adapter, [Reply(*v) for v in visits]) == []
    for layer in LAYERS:
        total = sum(weight for *_, weight in visits)
        direct = sum(w / total * product(plus(r, c), layer) for r, c, w in visits)
        assert np.allclose(direct, dense_mean(adapter, visits, layer), atol=1e-12)


def test_equal_starts_are_taken_together() -> None:
    adapter, visits = visits_of("lossy")
    starts = distinct_starts(adapter, [Reply(*v) for v in visits])
    assert [weight for weight, _ in starts] == [18 - 3, -15]


def test_what_a_site_of_low_rank_never_received_is_not_lost() -> None:
    """Nobody changes anything: the adapter stays, though one site saw a quarter of it."""
    adapter, _ = visits_of("the adapter")
    low = truncate(adapter, 1)
    still = {n: np.zeros_like(x) for n, x in low.items()}
    result = visit(Product(), adapter, [(low, still, 5)])
    assert distance(result, adapter) < 1e-5


def test_one_site_is_taken_over_as_it_is() -> None:
    adapter, [(_, change, _), *_] = visits_of("the adapter")
    result = visit(Product(), adapter, [(adapter, change, 3)])
    assert distance(result, plus(adapter, change)) < 1e-5


def test_the_nearest_gauge_stays_nearer_to_the_mean_factors_than_the_balanced_one() -> None:
    adapter, visits = visits_of("the adapter")
    total = sum(w for *_, w in visits)
    mean = {
        n: np.sum([w / total * (x + change[n]) for _, change, w in visits], axis=0)
        for n, x in adapter.items()
    }
    near = distance(visit(Product("nearest"), adapter, visits), mean)
    balanced = distance(visit(Product("balanced"), adapter, visits), mean)
    assert near < 0.1 * balanced


def test_the_first_round_from_a_zero_b_keeps_the_rows_of_a() -> None:
    """Only B has moved, so the mean is exact and A is what it was."""
    rng = np.random.default_rng(3)
    adapter = random_adapter(rng)
    changes = [random_adapter(rng, 0.1) for _ in range(3)]
    for name in adapter:
        if "lora_B" in name:
            adapter[name][:] = 0
        else:
            for change in changes:
                change[name][:] = 0
    rule = Product()
    result = play(rule, adapter, [(change, 1) for change in changes])
    assert rule.report()["truncation-error"] == pytest.approx(0, abs=1e-7)
    for name in adapter:
        expected = adapter[name] + sum(change[name] for change in changes) / 3
        assert np.allclose(result[name], expected, atol=1e-5)
