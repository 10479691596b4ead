"""The rule `fedsvd`: FFA's product, with orthonormal rows of A that follow what was learned."""

from __future__ import annotations

import numpy as np

from grandrounds.server.aggregation.make import make_rule
from grandrounds.wire.adapter import Adapter
from tests.server.aggregation.adapters import LAYERS, named, play, product, random_adapter, same


def a_round() -> tuple[dict[str, np.ndarray], list[tuple[Adapter, int]]]:
    rng = np.random.default_rng(5)
    changes = [random_adapter(rng, 0.3) for _ in range(3)]
    of_b = [{n: x for n, x in change.items() if "lora_B" in n} for change in changes]
    return random_adapter(rng), list(zip(of_b, (3, 10, 5), strict=True))


def mean_model(adapter: Adapter, replies: list[tuple[Adapter, int]], layer: str) -> np.ndarray:
    """Return sum_i p_i (B + dB_i) A in float64."""
    b, a = (adapter[f"{layer}.lora_{f}.weight"].astype(float) for f in "BA")
    total = sum(weight for _, weight in replies)
    change = sum(w / total * c[f"{layer}.lora_B.weight"].astype(float) for c, w in replies)
    mean: np.ndarray = (b + change) @ a
    return mean


def test_the_product_is_the_mean_of_the_models_and_a_its_right_singular_vectors() -> None:
    adapter, replies = a_round()
    result = play(make_rule(named("fedsvd")), adapter, replies)
    for layer, (rank, *_) in LAYERS.items():
        mean = mean_model(adapter, replies, layer)
        a, b = (result[f"{layer}.lora_{f}.weight"].astype(float) for f in "AB")
        assert np.allclose(b @ a, mean, atol=1e-6 * np.abs(mean).max())
        assert np.allclose(a @ a.T, np.eye(rank), atol=1e-6)
        sizes = np.linalg.svd(mean, compute_uv=False)[:rank]
        assert np.allclose(b.T @ b, np.diag(sizes**2), atol=1e-5 * sizes[0] ** 2)


def test_a_product_of_lower_rank_keeps_the_rows_of_a_for_the_rest() -> None:
    """One column of B alone is not zero: the other rows of A span what A spanned beside it."""
    adapter, _ = a_round()
    for layer in LAYERS:
        adapter[f"{layer}.lora_B.weight"][:, 1:] = 0
    still = {n: np.zeros_like(x) for n, x in adapter.items() if "lora_B" in n}
    result = play(make_rule(named("fedsvd")), adapter, [(still, 1)])
    for layer, (rank, *_) in LAYERS.items():
        a, before = (x[f"{layer}.lora_A.weight"].astype(float) for x in (result, adapter))
        assert np.allclose(product(result, layer), product(adapter, layer), atol=1e-5)
        assert np.allclose(a @ a.T, np.eye(rank), atol=1e-6)
        assert np.allclose(before @ a.T @ a, before, atol=1e-5)
        assert not result[f"{layer}.lora_B.weight"][:, 1:].any()


def test_an_untrained_b_stays_zero_beside_orthonormal_rows() -> None:
    adapter, _ = a_round()
    for layer in LAYERS:
        adapter[f"{layer}.lora_B.weight"][:] = 0
    still = {n: np.zeros_like(x) for n, x in adapter.items() if "lora_B" in n}
    result = play(make_rule(named("fedsvd")), adapter, [(still, 1)])
    for layer, (rank, *_) in LAYERS.items():
        a = result[f"{layer}.lora_A.weight"]
        assert np.allclose(a @ a.T, np.eye(rank), atol=1e-6)
        assert not result[f"{layer}.lora_B.weight"].any()


def test_a_new_instance_goes_on_to_the_bit() -> None:
    adapter, replies = a_round()
    rule = make_rule(named("fedsvd"))
    first = play(rule, adapter, replies)
    assert rule.state() == {}
    whole = play(rule, first, replies, 2)
    assert same(whole, play(make_rule(named("fedsvd")), first, replies, 2))
