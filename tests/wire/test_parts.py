"""How a site's own training is weighted against the federated adapter."""

from __future__ import annotations

import numpy as np

from grandrounds.wire.personal import moved, side_by_side

A, B = "m.lora_A.weight", "m.lora_B.weight"


def test_a_weighted_sum_of_products_is_exact_by_hand() -> None:
    """B1 A1 = [[2, 4], [6, 12]] and B2 A2 = [[3, -3], [0, 0]]:
    1/4 of the first and 3/4 of the second are [[2.75, -1.25], [1.5, 3]]."""
    one = {
        A: np.array([[1.0, 2.0]], np.float32),
        B: np.array([[2.0], [6.0]], np.float32),
    }
    other = {
        A: np.array([[1.0, -1.0], [0.0, 1.0]], np.float32),
        B: np.array([[3.0, 0.0], [0.0, 0.0]], np.float32),
    }
    joined = side_by_side([(one, 0.25), (other, 0.75)])
    assert joined[A].shape == (3, 2)
    assert joined[B].shape == (2, 3)
    np.testing.assert_array_equal(joined[B] @ joined[A], [[2.75, -1.25], [1.5, 3.0]])


def test_the_mean_of_factors_would_be_another_model() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        {
            A: rng.normal(size=(2, 5)).astype(np.float32),
            B: rng.normal(size=(4, 2)).astype(np.float32),
        }
        for _ in range(2)
    )
    joined = side_by_side([(one, 0.5), (other, 0.5)])
    exact = 0.5 * one[B] @ one[A] + 0.5 * other[B] @ other[A]
    np.testing.assert_allclose(joined[B] @ joined[A], exact, rtol=1e-5, atol=1e-6)
    of_factors = (0.5 * (one[B] + other[B])) @ (0.5 * (one[A] + other[A]))
    assert np.abs(of_factors - exact).max() > 0.1


def test_the_ends_of_the_line_are_the_adapters_to_the_bit() -> None:
    start = {A: np.array([[0.1, 0.7]], np.float32)}
    trained = {A: np.array([[0.3, -0.2]], np.float32)}
    assert moved(start, trained, 0.0) is start
    assert moved(start, trained, 1.0) is trained
    np.testing.assert_allclose(moved(start, trained, 0.25)[A], [[0.15, 0.475]], rtol=1e-6)
