"""What is measured of the updates of a round."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.config.words import beyond
from grandrounds.server.aggregation.product_error import ProductError
from grandrounds.server.updates import SAMPLED, sample

RANK = 16
SHAPES = {"m.lora_A.weight": (RANK, 4096), "m.lora_B.weight": (14336 * 12, RANK)}


def test_the_sample_looks_at_every_rank() -> None:
    """The numbers sampled of B are of all its columns, though their count is a power of two."""
    column = np.broadcast_to(np.arange(RANK, dtype=np.float32), SHAPES["m.lora_B.weight"])
    seen = sample(
        {"m.lora_A.weight": np.zeros((RANK, 4096), np.float32), "m.lora_B.weight": column}
    )
    assert set(seen[seen > 0].tolist()) == set(range(1, RANK))
    assert abs(len(seen) - SAMPLED) < 0.02 * SAMPLED


def test_a_reason_tells_a_value_from_the_limit_that_it_misses() -> None:
    assert beyond(0.0699, 0.07, 2) == "0.0699"
    assert beyond(-0.98, 0.07, 2) == "-0.98"
    assert beyond(3.00001, 3) == "3.00001"
    assert beyond(0.5, 0.5) == "0.5"


def test_small_updates_are_looked_at_whole() -> None:
    change = {"m.lora_A.weight": np.arange(20, dtype=np.float32).reshape(2, 10)}
    assert sample(change).tolist() == list(range(20))


def test_the_product_error_keeps_nothing_but_its_modules() -> None:
    """A decoded change is one vector, of which the tensors are views."""
    vector = np.zeros(2_000_000, np.float32)
    change = {
        "m.lora_A.weight": vector[:8].reshape(2, 4),
        "m.lora_B.weight": vector[8:14].reshape(3, 2),
    }
    error = ProductError(change, ["m"])
    error.add(change, 1)
    [(a, b)] = error._changes["m"]
    assert a.base is None
    assert b.base is None


@pytest.mark.parametrize("norm", [1.0, 1e-3])
def test_a_huge_update_is_scaled_to_the_bound(norm: float) -> None:
    from grandrounds.server.aggregation import defence

    huge = {"m.lora_A.weight": np.full((2, 10), 3e38, np.float32)}
    assert defence.norm(defence.norm_bound(huge, norm)[0]) == pytest.approx(norm, rel=1e-6)
