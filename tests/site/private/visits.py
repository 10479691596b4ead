"""Units, coins and gradients that the tests of private visits share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.resident import Resident
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.per_unit import per_unit
from grandrounds.site.private.visit import (
    PrivateSettings,
    Unit,
    add_batch,
    add_clipped_units,
    microbatches,
)
from grandrounds.wire.adapter import factor_of
from tests.site.test_training import CPU, LEAN, PAD, examples_of, settings

LENGTHS = [9, 14, 6, 11, 8, 12, 10, 7, 15, 13]
EXAMPLES = examples_of(LENGTHS)
UNITS: list[list[TokenizedExample]] = [
    EXAMPLES[0:1],
    EXAMPLES[1:2],
    EXAMPLES[2:5],
    EXAMPLES[5:7],
    *([e] for e in EXAMPLES[7:]),
]
"""Seven units; one has three records and one two."""

MECHANISM = Mechanism(1.0, 0.5, 0.5, len(UNITS), steps=2, visits=1, delta=1e-5)


class Drawn:
    """Coins of a test: every unit is drawn, and the noise is 0, or what is given."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def uniforms(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)

    def normals(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.full((count,), self.noise, dtype=torch.float64, device=device)


def factors_of(resident: Resident, which: str = "AB") -> list[torch.nn.Parameter]:
    """Return the factors to train, and let only them have a gradient."""
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(factor_of(name) in which)
    return [p for p in resident.parameters.values() if p.requires_grad]


def private_settings(mechanism: Mechanism = MECHANISM, **changes: Any) -> PrivateSettings:
    microbatch = changes.pop("microbatch", 4)
    return PrivateSettings(mechanism, microbatch, settings(**changes))


def clipped_sums(
    resident: Resident,
    parameters: Sequence[torch.nn.Parameter],
    units: Sequence[Unit],
    how: PrivateSettings,
) -> list[torch.Tensor]:
    """Return the clipped sum of all units' gradients, by microbatches."""
    resident.model.train()
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    with per_unit(resident.model, parameters, how.microbatch) as collected:
        for batch in microbatches(units, how.microbatch):
            add_batch(resident.model, batch, collected, how, PAD)
            add_clipped_units(sums, collected, batch, how.mechanism.clipping_norm)
    return sums


def naive_sums(
    resident: Resident,
    parameters: Sequence[torch.nn.Parameter],
    units: Sequence[Unit],
    clipping_norm: float,
    forward: Forward = LEAN,
) -> list[torch.Tensor]:
    """Return the same by autograd, one record at a time, in float64."""
    resident.model.train()
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for unit in units:
        total = [torch.zeros_like(s) for s in sums]
        for record in unit:
            answer = len(record.input_ids) - max(1, record.prompt_tokens)
            with attending(resident.model, forward):
                loss = answer_nll_sum(resident.model, [record], PAD, CPU, forward) / answer
                for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                    t += g.double()
        norm = float(torch.sqrt(torch.stack([t.square().sum() for t in total]).sum()))
        for s, t in zip(sums, total, strict=True):
            s += t * min(1.0, clipping_norm / norm)
    return sums


def error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the relative error of a sum over all tensors."""
    distance = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((distance / sum(float(b.square().sum()) for b in expected)) ** 0.5)
