"""What each codec may cost a value at most: the bounds that its docstring states."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.codecs import coding_of
from grandrounds.wire.codecs.blocks import SCALES_PER_OCTAVE, Blocks
from grandrounds.wire.codecs.codec import Codec
from grandrounds.wire.codecs.plain import BFloat16, Raw
from grandrounds.wire.codecs.ternary import Ternary
from grandrounds.wire.codecs.topk import TopK

Floats = NDArray[np.float32]
Bounds = NDArray[np.float64]


def worst_error(codec: Codec, values: Floats) -> Bounds:
    """Return the largest |decoded - value| that each value can meet, whatever is drawn."""
    return bound_of(coding_of(codec), values)


def bound_of(coding: object, values: Floats) -> Bounds:
    exact = np.abs(values.astype(np.float64))
    if isinstance(coding, Raw):
        return np.zeros(len(values))
    if isinstance(coding, BFloat16):  # 2**-8 of each value, and half the smallest step
        return np.asarray(exact * 2.0**-8 + 2.0**-134)
    if isinstance(coding, Blocks):
        return of_blocks(coding, values)
    if isinstance(coding, Ternary):  # the value, and a kept one's scale
        rows = coding._rows(values)
        kept, sizes = coding._kept(rows, len(values))
        scale = np.where(kept, sizes[:, None].astype(np.float64), 0) * 2 ** (1 / SCALES_PER_OCTAVE)
        bound = np.abs(rows.astype(np.float64)) + scale + 2e-43
        return np.asarray(bound.reshape(-1)[: len(values)])
    assert isinstance(coding, TopK)  # the value where it is left out
    positions = coding._largest(values)
    exact[positions] = of_blocks(coding.values, values[positions])
    return np.asarray(exact)


def of_blocks(coding: Blocks, values: Floats) -> Bounds:
    """Random rounding: a step, 2 * scale / (2**bits - 1). Sign: |value| + scale. On top, 2**-20 of
    the scale for float32's rounding; and for its subnormal numbers a unit of 2**-149 in the step,
    which the widest code has 2**bits - 1 times, and one in the scale. (The bound was once 2e-43,
    143 units; int8 may be 255 off.)"""
    sizes = coding._sizes(values).astype(np.float64)
    smallest = sizes.max() * 2.0 ** (-254 / SCALES_PER_OCTAVE)
    scales = np.maximum(sizes * 2 ** (1 / SCALES_PER_OCTAVE), smallest) * (sizes > 0)
    scale = np.repeat(scales, coding.block)[: len(values)]
    error = scale / coding._half if coding.unbiased else np.abs(values.astype(np.float64)) + scale
    return np.asarray(error + scale * 2.0**-20 + 2**coding.bits * 2.0**-149)
