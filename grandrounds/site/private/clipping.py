"""The flat clip: a unit's whole gradient, over all trained tensors, is at most so long.

It bounds the sensitivity of a sum of gradients by the clipping norm C, whatever the data are: one
unit more or less moves the sum by at most C in L2 norm. Nothing else enters the sensitivity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MARGIN = 1e-6
"""Relative shortening of every clipped gradient. It covers the rounding of products in float32."""

LEAST_FACTOR = 1e-30
"""A smaller factor would lose its precision in float32, and the clip with it."""


def clip_factors(gradients: Sequence[torch.Tensor], clipping_norm: float) -> torch.Tensor:
    """Return by what each unit's gradient is multiplied: min(1, C / norm) (1 - 1e-6).

    Norms are computed in float64, so that no square of a float32 overflows. A gradient that is not
    finite, or longer than 1e30 C, gets 0: the unit is left out, which is a bounded function of that
    unit alone.

    Parameters
    ----------
    gradients
        Of each trained tensor, float32 of (units, ...).
    clipping_norm : float
        C.

    Returns
    -------
    float64 tensor of (units), each from 0 to below 1.
    """
    squares = torch.stack(
        [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
    ).square_()  # (tensors, units)
    norms = squares.sum(dim=0).sqrt_()
    factors = (clipping_norm / norms).clamp_(max=1.0).mul_(1.0 - MARGIN)
    return torch.where(norms.isfinite() & (factors >= LEAST_FACTOR), factors, 0.0)


def add_clipped(
    sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], clipping_norm: float
) -> None:
    """Add the clipped gradients of some units to sums, in place.

    Parameters
    ----------
    sums
        float64, of the shapes of the trained tensors.
    gradients
        Of each trained tensor, float32 of (units, ...); rows that are not finite are set to 0.
    """
    factors = clip_factors(gradients, clipping_norm)
    left_out = (factors == 0).nonzero().flatten()
    for total, gradient in zip(sums, gradients, strict=True):
        if len(left_out):
            gradient[left_out] = 0.0  # 0 times an infinity would be NaN
        total += (factors.to(gradient.dtype) @ gradient.flatten(1)).view(total.shape)
