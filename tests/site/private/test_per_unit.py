"""Clipped sums of per-unit gradients against one record at a time, in every way to train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grandrounds.model.loss import Forward
from grandrounds.model.resident import checkpoint_activations
from tests.site.private.visits import (
    MECHANISM,
    UNITS,
    clipped_sums,
    factors_of,
    naive_sums,
    private_settings,
)
from tests.site.test_training import make

HIGHEST_ERROR = 1e-5
"""Relative, of a clipped sum; float32 gives 3e-7."""


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the relative error of a sum over all tensors."""
    distance = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((distance / sum(float(b.square().sum()) for b in expected)) ** 0.5)


@pytest.mark.parametrize("which", ["AB", "B", "A"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_clipped_sum_is_that_of_one_record_at_a_time(
    tiny_base: Path, which: str, checkpointing: bool
) -> None:
    """Padding-free and padded, chunked logits or not, microbatches of 1, 5 and 16 records."""
    resident = make(tiny_base)
    parameters = factors_of(resident, which)
    expected = naive_sums(resident, parameters, UNITS, MECHANISM.clipping_norm)
    checkpoint_activations(resident, checkpointing)
    try:
        for padding_free in (True, False):
            for chunk in (0, 7):
                for microbatch in (1, 5, 16):
                    forward = Forward(False, padding_free, True, chunk)
                    how = private_settings(microbatch=microbatch, forward=forward)
                    found = clipped_sums(resident, parameters, UNITS, how)
                    assert error(found, expected) < HIGHEST_ERROR, (padding_free, chunk, microbatch)
    finally:
        checkpoint_activations(resident, False)
