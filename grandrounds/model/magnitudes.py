"""Where DoRA's magnitudes start: the norms of the rows of the base's weights.

    W' = m (W + s B A) / ||W + s B A||,   m = ||W|| at the start

Liu et al., DoRA (2024), equation 5; norms are over the inputs of each output. PEFT computes the
start in the type of the weights, so bfloat16 rounds it to 8 bits, and in whatever order the device
adds. Here it is the same to the bit on every machine that holds the same weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grandrounds.errors import ModelError
from grandrounds.wire.adapter import MAGNITUDE, Adapter

FRACTION_BITS = 40
"""Bits of a square after the binary point, in units of the largest weight's power of two: integers
add up to the same sum in any order, and up to 2^22 inputs they do not overflow."""

Norms = NDArray[np.float32]

CHUNK = 2**20
"""Weights taken at a time, so that copies in float64 stay small."""


@torch.no_grad()
def base_magnitudes(model: Any) -> Adapter:
    """Return the start of the magnitudes of a base with DoRA on it, float32, under PEFT's names.

    Quantised weights are dequantised as PEFT does for each step.

    Raises
    ------
    ModelError
        If a row of a weight is zero or not finite: DoRA divides by its norm.
    """
    from peft.utils.integrations import dequantize_module_weight

    found = {}
    for path, module in model.named_modules():
        if not getattr(module, "lora_magnitude_vector", None):
            continue
        weight = dequantize_module_weight(module.get_base_layer()).detach()
        norms = row_norms(weight.T if module.fan_in_fan_out else weight)
        unfit = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if unfit.size:
            raise ModelError(
                f"model.lora.peft-use-dora = true: the norm of row {unfit[0]} of {path} is "
                f"{norms[unfit[0]]:g}, and DoRA divides by it. Name other modules in "
                "model.lora.target-modules, or train without DoRA."
            )
        found[path + MAGNITUDE] = norms
    return found


def row_norms(weight: torch.Tensor) -> Norms:
    """Return the L2 norm of each row of a matrix; nan for a row that is not finite.

    Squares are rounded to integers of 2^-`FRACTION_BITS`, in units of the row's largest power of
    two, so a norm over n inputs has a relative error of at most n 2^-`FRACTION_BITS` before it is
    rounded to float32.
    """
    rows = max(1, CHUNK // weight.shape[1])
    return np.concatenate([_norms(part) for part in torch.split(weight, rows)])


def _norms(weight: torch.Tensor) -> Norms:
    largest = weight.abs().amax(dim=1, keepdim=True).double()  # (rows, 1)
    finite = largest.isfinite()
    _, exponent = torch.frexp(torch.where(finite, largest, 0.0))
    scale = torch.ldexp(finite.double(), FRACTION_BITS // 2 - exponent)
    sums = weight.double().mul_(scale).square_().round_().long().sum(dim=1)
    powers = exponent[:, 0].cpu().numpy() - FRACTION_BITS // 2
    norms = np.ldexp(np.sqrt(np.maximum(sums.cpu().numpy(), 0).astype(np.float64)), powers)
    norms[~finite[:, 0].cpu().numpy()] = np.nan
    return np.asarray(norms, dtype=np.float32)
