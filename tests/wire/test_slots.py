"""Where adapters lie in the resident one."""

from __future__ import annotations

import numpy as np

from grandrounds.wire import slots

A, B = "m.lora_A.weight", "m.lora_B.weight"


def of_rank(rank: int, value: float) -> dict[str, np.ndarray]:
    return {
        A: np.full((rank, 3), value, np.float32),
        B: np.full((2, rank), 10 * value, np.float32),
    }


def test_a_whole_adapter_is_placed_without_a_copy() -> None:
    whole = of_rank(4, 1.0)
    assert slots.place({A: (4, 3), B: (2, 4)}, (whole, 0)) is whole


def test_a_lower_rank_is_followed_by_zeros() -> None:
    placed = slots.place({A: (4, 3), B: (2, 4)}, (of_rank(1, 1.0), 0))
    assert placed[A].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert placed[B].tolist() == [[10, 0, 0, 0], [10, 0, 0, 0]]


def test_a_fresh_adapter_stands_behind_the_largest_stack() -> None:
    """Stack of rank 2, largest 3, fresh of rank 1."""
    placed = slots.place({A: (4, 3), B: (2, 4)}, (of_rank(2, 1.0), 0), (of_rank(1, 7.0), 3))
    assert placed[A][:, 0].tolist() == [1, 1, 0, 7]
    assert placed[B][0].tolist() == [10, 10, 0, 70]
    assert slots.resident_rank("flora", 1, 3) == 4
    assert slots.trained_ranks("flora", 1, 3, 1) == slice(3, 4)


def test_a_factor_that_was_not_sent_is_the_one_drawn() -> None:
    sent_b = {B: of_rank(4, 5.0)[B]}
    placed = slots.place({A: (4, 3), B: (2, 4)}, (of_rank(4, 1.0), 0), (sent_b, 0))
    assert (placed[A] == 1.0).all()
    assert (placed[B] == 50.0).all()


def test_only_the_trained_part_is_taken() -> None:
    change = of_rank(4, 1.0)
    change[B][:, 0] = -1
    part = slots.take(change, "B", slice(0, 2))
    assert list(part) == [B]
    assert part[B].tolist() == [[-1, 10], [-1, 10]]
    assert part[B].flags.c_contiguous
    assert slots.trained_ranks("product", 4, 16, 2) == slice(0, 2)
    assert slots.trained_ranks("fedavg", 4, 16, 4) == slots.EVERYTHING
