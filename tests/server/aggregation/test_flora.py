"""FLoRA's stack against dense matrices, and where it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.server.aggregation.flora import Flora
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import LAYERS, plus, product, random_adapter


def fresh(rng: np.random.Generator, rank: int) -> Adapter:
    adapter = random_adapter(rng, rank=rank)
    for name in adapter:
        if "lora_B" in name:
            adapter[name][:] = 0
    return adapter


def stacked(
    rule: Flora, adapter: Adapter, seed: int, ranks: tuple[int, ...] = (4, 4, 4)
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """Play a round; return its result and the dense B A + sum_i p_i B_i A_i of each layer."""
    rng = np.random.default_rng(seed)
    weights = [3 + i for i in range(len(ranks))]
    rule.begin(1, adapter)
    expected = {layer: product(adapter, layer) for layer in LAYERS}
    for partition, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        received = fresh(np.random.default_rng(99), rank)  # the same for all of a rank
        change = random_adapter(rng, 0.1, rank=rank)
        rule.add(partition, received, change, weight)
        for layer in LAYERS:
            moved = product(plus(received, change), layer)
            expected[layer] = expected[layer] + weight / sum(weights) * moved
    return rule.result(), expected


def rank_of(adapter: Adapter) -> int:
    [rank] = {int(x.shape[0]) for n, x in adapter.items() if "lora_A" in n}
    assert {x.shape[1] for n, x in adapter.items() if "lora_B" in n} == {rank}
    return rank


def test_the_stack_is_exact_over_two_rounds() -> None:
    """Rank 1 of zeros is dropped, then 3 sites of rank 4, then 3 more."""
    rule = Flora(max_rank=100)
    adapter = fresh(np.random.default_rng(0), 1)
    for seed, rank in ((1, 12), (2, 24)):
        adapter, expected = stacked(rule, adapter, seed)
        assert rank_of(adapter) == rank
        assert rule.report() == {"truncation-error": 0.0, "rank": float(rank)}
        for layer in LAYERS:
            assert np.allclose(product(adapter, layer), expected[layer], atol=1e-5)


def test_sites_of_different_ranks_are_stacked() -> None:
    rule = Flora(max_rank=100)
    start = random_adapter(np.random.default_rng(0), rank=2)
    adapter, expected = stacked(rule, start, 1, (1, 5, 3))
    assert rank_of(adapter) == 2 + 1 + 5 + 3
    for layer in LAYERS:
        assert np.allclose(product(adapter, layer), expected[layer], atol=1e-5)


@pytest.mark.parametrize("max_rank", [1, 4])
def test_a_stack_past_the_largest_rank_is_cut_to_the_best_product(max_rank: int) -> None:
    rule = Flora(max_rank)
    start = random_adapter(np.random.default_rng(0))
    adapter, expected = stacked(rule, start, 1)
    assert rank_of(adapter) == max_rank
    error = norm = 0.0
    for layer, matrix in expected.items():
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        best = u[:, :max_rank] * s[:max_rank] @ v[:max_rank]
        assert np.allclose(product(adapter, layer), best, atol=1e-4)
        error += float(np.sum(s[max_rank:] ** 2))
        norm += float(np.sum(s**2))
    assert rule.report()["rank"] == max_rank
    assert rule.report()["truncation-error"] == pytest.approx((error / norm) ** 0.5, rel=1e-4)


def test_a_start_that_is_zero_only_in_one_module_is_stacked() -> None:
    start = random_adapter(np.random.default_rng(0), rank=2)
    start["first.lora_B.weight"][:] = 0
    adapter, expected = stacked(Flora(max_rank=100), start, 1, (3,))
    assert rank_of(adapter) == 5
    for layer in LAYERS:
        assert np.allclose(product(adapter, layer), expected[layer], atol=1e-5)


def test_a_hand_example() -> None:
    """Numbers instead of matrices. B A = 2 * 3; sites (1 and 3 examples) make 4 * 1 and 8 * 1 out
    of A = 1: A = [3, 1, 1], B = [2, 4 / 4, 3 * 8 / 4] = [2, 1, 6], product 6 + 1 + 6 = 13."""

    def numbers(a: float, b: float) -> Adapter:
        return {
            "m.lora_A.weight": np.array([[a]], np.float32),
            "m.lora_B.weight": np.array([[b]], np.float32),
        }

    rule = Flora(max_rank=9)
    rule.begin(1, numbers(3, 2))
    rule.add(1, numbers(1, 0), numbers(0, 8), 3)
    rule.add(0, numbers(1, 0), numbers(0, 4), 1)
    result = rule.result()
    assert result["m.lora_A.weight"].tolist() == [[3.0], [1.0], [1.0]]
    assert result["m.lora_B.weight"].tolist() == [[2.0, 1.0, 6.0]]
