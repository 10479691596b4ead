"""How far mean(B) mean(A) is from mean(B A), against dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from grandrounds.server.aggregation.product_error import ProductError, factor_gram, measured_modules

Adapter = dict[str, NDArray[np.float32]]
LAYERS = {"first": (3, 11, 7), "second": (2, 5, 13)}
"""Name → (rank, out, in); no layer is square."""


def random_adapter(rng: np.random.Generator) -> Adapter:
    adapter: Adapter = {}
    for name, (rank, out, into) in LAYERS.items():
        adapter[f"{name}.lora_A.weight"] = rng.normal(size=(rank, into)).astype(np.float32)
        adapter[f"{name}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    return adapter


def of_numbers(a: float, b: float, changes: list[tuple[float, float, int]]) -> ProductError:
    """Return the error of one module of 1 x 1 factors, each site's (change of A, of B, weight)."""

    def factors(a: float, b: float) -> Adapter:
        return {
            "m.lora_A.weight": np.array([[a]], np.float32),
            "m.lora_B.weight": np.array([[b]], np.float32),
        }

    error = ProductError(factors(a, b), ["m"])
    for of_a, of_b, weight in changes:
        error.add(factors(of_a, of_b), weight)
    return error


def test_a_hand_example_of_numbers_instead_of_matrices() -> None:
    """Two sites, one example each. A = 1 and 3, B = 1 and 2 (start 0): the mean of B A is
    (1 * 1 + 2 * 3) / 2 = 3.5; B_mean A_mean = 1.5 * 2 = 3; the error is 0.5 / 3.5 = 1/7."""
    error = of_numbers(0.0, 0.0, [(1.0, 1.0, 1), (3.0, 2.0, 1)])
    assert error.result() == pytest.approx(1 / 7, rel=1e-12)


def test_a_hand_example_with_weights_and_a_start() -> None:
    """Start A = 1, B = 0. Site 1 (3 examples) changes B by 1: A 1, B 1, product 1. Site 2 (1
    example) changes A by 4, B by 2: A 5, B 2, product 10. Mean product (3 + 10) / 4 = 3.25; mean A
    (3 + 5) / 4 = 2, mean B (3 + 2) / 4 = 1.25, together 2.5; the error is 0.75 / 3.25 = 3/13."""
    error = of_numbers(1.0, 0.0, [(0.0, 1.0, 3), (4.0, 2.0, 1)])
    assert error.result() == pytest.approx(3 / 13, rel=1e-12)


def test_the_error_agrees_with_dense_matrices_on_layers_that_are_not_square() -> None:
    rng = np.random.default_rng(4)
    start = random_adapter(rng)
    changes = [random_adapter(rng) for _ in range(4)]
    weights = [5, 1, 17, 3]
    measured = ProductError(start, list(LAYERS))
    for change, weight in zip(changes, weights, strict=True):
        measured.add(change, weight)
    shares = np.array(weights) / sum(weights)
    error = norm = 0.0
    for name in LAYERS:
        a = [start[f"{name}.lora_A.weight"].astype(float) + c[f"{name}.lora_A.weight"]
             for c in changes]  # fmt: skip
        b = [start[f"{name}.lora_B.weight"].astype(float) + c[f"{name}.lora_B.weight"]
             for c in changes]  # fmt: skip
        products = sum(p * y @ x for p, x, y in zip(shares, a, b, strict=True))
        mean_a = sum(p * x for p, x in zip(shares, a, strict=True))
        mean_b = sum(p * y for p, y in zip(shares, b, strict=True))
        error += float(np.sum((products - mean_b @ mean_a) ** 2))
        norm += float(np.sum(np.asarray(products) ** 2))
    assert measured.result() == pytest.approx((error / norm) ** 0.5, rel=1e-9)
    assert measured.result() > 0.1


def test_the_error_is_zero_where_all_sites_agree() -> None:
    rng = np.random.default_rng(4)
    start, change = random_adapter(rng), random_adapter(rng)
    measured = ProductError(start, list(LAYERS))
    for weight in (1, 4, 9):
        measured.add(change, weight)
    assert measured.result() == pytest.approx(0.0, abs=1e-7)


def test_the_error_of_the_update_is_relative_to_what_the_round_changed() -> None:
    """Start A = B = 1, product 1. Site 1 (3 examples) changes B by 1: product 2. Site 2 (1 example)
    changes A by 4 and B by 2: A 5, B 3, product 15. Mean product (6 + 15) / 4 = 5.25; mean A 2,
    mean B 2.25, together 4.5; the error 0.75 is 1/7 of the product and 0.75 / 4.25 = 3/17 of the
    update."""
    error = of_numbers(1.0, 1.0, [(0.0, 1.0, 3), (4.0, 2.0, 1)])
    assert error.result() == pytest.approx(1 / 7, rel=1e-12)
    assert error.of_update() == pytest.approx(3 / 17, rel=1e-12)


def test_the_error_is_zero_where_nothing_changed() -> None:
    start = {name: np.zeros_like(x) for name, x in random_adapter(np.random.default_rng(1)).items()}
    measured = ProductError(start, list(LAYERS))
    measured.add(start, 1)
    assert measured.result() == measured.of_update() == 0.0


@pytest.mark.parametrize("block", [1, 4, 256])
def test_the_gram_matrix_of_factors_does_not_depend_on_the_block(block: int) -> None:
    rng = np.random.default_rng(2)
    start = rng.normal(size=(9, 2)).astype(np.float32)
    changes = [rng.normal(size=(9, 2)).astype(np.float32) for _ in range(3)]
    shares = np.array([0.5, 0.25, 0.25])
    factors = [start.astype(float) + change for change in changes]
    factors.append(0.5 * factors[0] + 0.25 * factors[1] + 0.25 * factors[2])
    factors.append(start.astype(float))
    gram = factor_gram(start, changes, shares, block)
    assert gram.shape == (5, 2, 5, 2)
    for i, left in enumerate(factors):
        for j, right in enumerate(factors):
            assert gram[i, :, j] == pytest.approx(left.T @ right, rel=1e-12, abs=1e-12)


def names(modules: int) -> list[str]:
    return [f"layer{i}.lora_{kind}.weight" for i in range(modules) for kind in "AB"]


@pytest.mark.parametrize(
    ("modules", "cohort", "measured"),
    [(60, 2, 8), (60, 10, 6), (4, 2, 2), (4, 20, 1), (1, 1, 1)],
)
def test_so_few_modules_are_measured_that_they_take_the_memory_of_one_adapter(
    modules: int, cohort: int, measured: int
) -> None:
    chosen = measured_modules(names(modules), cohort)
    assert len(chosen) == len(set(chosen)) == measured
    assert chosen[0] == "layer0"
    if measured > 1:
        assert chosen[-1] == f"layer{modules - 1}"
