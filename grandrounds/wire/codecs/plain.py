"""Codecs without a scale: unchanged float32, and bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grandrounds.errors import ReplyError
from grandrounds.wire.codecs.codec import CHUNK, Codec
from grandrounds.wire.codecs.finite import all_finite

LARGEST_BF16 = np.float32(3.3895313892515355e38)
"""0x7f7f, the largest finite bfloat16: (2 - 2**-7) * 2**127."""


def make(codec: Codec) -> Raw | BFloat16:
    """Return bfloat16, or unchanged float32 for `none` and `float32`."""
    return BFloat16() if codec.name == "bf16" else Raw()


@dataclass(frozen=True)
class Raw:
    """float32, little-endian: 4 bytes a value."""

    def body_bytes(self, count: int) -> int:
        """Return the exact length for this many values."""
        return 4 * count

    def encode(
        self, values: NDArray[np.float32], generator: np.random.Generator, body: NDArray[np.uint8]
    ) -> None:
        """Write the values into `body`."""
        body.view("<f4")[:] = values

    def decode(self, body: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
        """Return the values.

        Raises
        ------
        ReplyError
            If a value is not finite.
        """
        return _finite(body.view("<f4").astype(np.float32))


@dataclass(frozen=True)
class BFloat16:
    """The upper half of float32, rounded to nearest, ties to even: 2 bytes a value.

    Eight bits of precision. Deterministic: the error of a value does not depend on the seed, and is
    at most 2**-9 of the value (2**-8 beyond the largest bfloat16, where values are clipped).
    """

    def body_bytes(self, count: int) -> int:
        """Return the exact length for this many values."""
        return 2 * count

    def encode(
        self, values: NDArray[np.float32], generator: np.random.Generator, body: NDArray[np.uint8]
    ) -> None:
        """Write the rounded values into `body`."""
        halves = body.view("<u2")
        chunk, odd = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint32)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            bits = np.clip(part, -LARGEST_BF16, LARGEST_BF16, out=chunk[: len(part)])
            words, last = bits.view(np.uint32), odd[: len(part)]
            np.right_shift(words, 16, out=last)
            last &= 1
            words += last
            words += 0x7FFF
            words >>= 16
            halves[start : start + CHUNK] = words

    def decode(self, body: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
        """Return the values.

        Raises
        ------
        ReplyError
            If a value is not finite.
        """
        words = np.empty(count, np.uint32)
        halves = body.view("<u2")
        for start in range(0, count, CHUNK):
            part = words[start : start + CHUNK]
            part[:] = halves[start : start + CHUNK]
            part <<= 16
        return _finite(words.view(np.float32))


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not all_finite(values):
        wrong = int((~np.isfinite(values)).sum())
        raise ReplyError(f"{wrong} of {len(values)} numbers are not finite")
    return values
