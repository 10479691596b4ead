"""Top-k sparsification: the largest values of a vector, and their positions.

    body = high parts of the positions | low parts | the values as int4 with scales

The k positions p_0 < p_1 < ... of n are Elias-Fano coded (Elias, 1974; Fano, 1971): the lowest
l = floor(log2(n / k)) bits of each verbatim, the rest in unary as bit (p_i >> l) + i of a bitmap.
At 5 % that is 6.3 bits per position, where the entropy is 5.7; the length depends on n and k
only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grandrounds.errors import ReplyError
from grandrounds.wire.codecs.blocks import Blocks, Bytes, Floats
from grandrounds.wire.codecs.codec import Codec

Positions = NDArray[np.int64]


def make(codec: Codec) -> TopK:
    """Return the codec; kept values are encoded as int4."""
    return TopK(codec.kept_share, Blocks(4, codec.block))


@dataclass(frozen=True)
class TopK:
    """The k = max(1, ceil(kept_share * count)) largest magnitudes; the others are 0."""

    kept_share: float
    """Above 0, at most 1."""
    values: Blocks
    """How the kept values are encoded."""

    def kept(self, count: int) -> int:
        """Return k for this many values."""
        return max(1, math.ceil(self.kept_share * count))

    def body_bytes(self, count: int) -> int:
        """Return the exact length for this many values."""
        kept = self.kept(count)
        return position_bytes(count, kept) + self.values.body_bytes(kept)

    def encode(self, values: Floats, generator: np.random.Generator, body: Bytes) -> None:
        """Write the positions and the values into `body`."""
        positions = self._largest(values)
        length = position_bytes(len(values), len(positions))
        write_positions(positions, len(values), body[:length])
        self.values.encode(values[positions], generator, body[length:])

    def decode(self, body: Bytes, count: int) -> Floats:
        """Return the values.

        Raises
        ------
        ReplyError
            If the positions are not k distinct ones in range, or the values cannot be decoded.
        """
        kept = self.kept(count)
        length = position_bytes(count, kept)
        positions = read_positions(body[:length], count, kept)
        out = np.zeros(count, np.float32)
        out[positions] = self.values.decode(body[length:], kept)
        return out

    def _largest(self, values: Floats) -> Positions:
        """Return the positions of the largest magnitudes, ascending; the first of equal ones."""
        kept = self.kept(len(values))
        magnitudes = np.abs(values)
        threshold = np.partition(magnitudes, len(values) - kept)[len(values) - kept]
        chosen = magnitudes > threshold
        missing = kept - int(np.count_nonzero(chosen))
        chosen[np.flatnonzero(magnitudes == threshold)[:missing]] = True
        return np.flatnonzero(chosen)


def position_bytes(count: int, kept: int) -> int:
    """Return the exact length of the positions of `kept` out of `count` values."""
    low_bits, bitmap_bits = _layout(count, kept)
    return -(-bitmap_bits // 8) + low_bits * -(-kept // 8)


def write_positions(positions: Positions, count: int, body: Bytes) -> None:
    """Write ascending positions: the bitmap of the high parts, then the low parts bit by bit."""
    low_bits, bitmap_bits = _layout(count, len(positions))
    bitmap = np.zeros(bitmap_bits, np.bool_)
    bitmap[(positions >> low_bits) + np.arange(len(positions))] = True
    packed = np.packbits(bitmap)
    body[: len(packed)] = packed
    planes = body[len(packed) :].reshape(low_bits, -(-len(positions) // 8))
    for place, plane in enumerate(planes):
        plane[:] = np.packbits((positions >> place & 1).astype(np.bool_))


def read_positions(body: Bytes, count: int, kept: int) -> Positions:
    """Return what `write_positions` wrote.

    Raises
    ------
    ReplyError
        If they are not `kept` ascending positions below `count`.
    """
    low_bits, bitmap_bits = _layout(count, kept)
    high_bytes = -(-bitmap_bits // 8)
    ones = np.flatnonzero(np.unpackbits(body[:high_bytes], count=bitmap_bits))
    if len(ones) != kept:
        raise ReplyError(f"got {len(ones)} positions, expected {kept} of {count}")
    positions: Positions = (ones - np.arange(kept)) << low_bits
    for place, plane in enumerate(body[high_bytes:].reshape(low_bits, -(-kept // 8))):
        positions |= np.unpackbits(plane, count=kept).astype(np.int64) << place
    if positions[-1] >= count or (positions[1:] <= positions[:-1]).any():
        raise ReplyError(f"positions must be ascending and below {count}")
    return positions


def _layout(count: int, kept: int) -> tuple[int, int]:
    """Return the number of low bits per position, and of bits in the bitmap."""
    low_bits = (count // kept).bit_length() - 1
    return low_bits, kept + ((count - 1) >> low_bits)
