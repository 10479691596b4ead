"""Ternary codes (-1, 0, 1) with one scale per block: log2(3) = 1.6 bits per value.

    body = largest scale (float32) | one byte of scale per block | the codes, five to a byte

Values below `DEAD_ZONE` times the block's mean magnitude become 0; of the others only the sign is
kept. The scale is their mean magnitude, which minimises the squared error (Ternary Weight Networks:
Li & Liu, 2016, equations 5 and 6, with a wider zone). Deterministic, so it relies on error
feedback. Most codes are 0, and Zstandard compresses them further: two thirds of Gaussian values
become 0, at an entropy of 1.2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grandrounds.wire.codecs.blocks import Bytes, Floats, largest_scale, scale_table
from grandrounds.wire.codecs.codec import Codec

DEAD_ZONE = 1.25
"""In units of the mean magnitude; one standard deviation for Gaussian values."""

PER_BYTE = 5
"""3**5 = 243 of 256."""

_PLACES = 3 ** np.arange(PER_BYTE, dtype=np.uint8)

_UNPACKED = (np.arange(256)[:, None] // _PLACES % 3).astype(np.int8) - 1
_UNPACKED[3**PER_BYTE :] = 0
"""Byte → five codes; bytes that no encoder writes decode to zeros."""


def make(codec: Codec) -> Ternary:
    """Return the codec."""
    return Ternary(codec.block)


@dataclass(frozen=True)
class Ternary:
    """Codes of -1, 0, 1; `block` consecutive values share a scale."""

    block: int
    """A power of two, at least 8."""

    def body_bytes(self, count: int) -> int:
        """Return the exact length for this many values."""
        return 4 - (-count // self.block) - (-count // PER_BYTE)

    def encode(self, values: Floats, generator: np.random.Generator, body: Bytes) -> None:
        """Write the scales and the codes into `body`."""
        rows = self._rows(values)  # (blocks, block)
        kept, sizes = self._kept(rows, len(values))
        largest = sizes.max()
        table = scale_table(largest).astype(np.float64)
        scales = np.searchsorted((table[:-1] + table[1:]) / 2, sizes).astype(np.uint8)
        body[:4] = np.frombuffer(largest.astype("<f4").tobytes(), np.uint8)
        body[4 : 4 + len(scales)] = scales
        codes = np.ones(-(-len(values) // PER_BYTE) * PER_BYTE, np.uint8)
        signs = kept.reshape(-1)[: len(values)] * np.sign(values)
        codes[: len(values)] += signs.astype(np.int8).view(np.uint8)  # -1 is 255, and wraps to 0
        body[4 + len(scales) :] = codes.reshape(-1, PER_BYTE) @ _PLACES

    def decode(self, body: Bytes, count: int) -> Floats:
        """Return the values.

        Raises
        ------
        ReplyError
            If the largest scale is negative or not finite.
        """
        largest = largest_scale(body)
        blocks = -(-count // self.block)
        scales = scale_table(largest)[body[4 : 4 + blocks]]
        codes = _UNPACKED[body[4 + blocks :]].reshape(-1)[:count]
        out = self._rows(codes.astype(np.float32))
        out *= scales[:, None]
        return out.reshape(-1)[:count]

    def _kept(self, rows: Floats, count: int) -> tuple[NDArray[np.bool_], Floats]:
        """Return which values lie outside the dead zone, and their mean magnitude by block."""
        magnitudes = np.abs(rows).astype(np.float64)
        lengths = np.full(len(rows), self.block)
        lengths[-1] = count - (len(rows) - 1) * self.block
        edges = DEAD_ZONE * magnitudes.sum(axis=1) / lengths
        kept = (magnitudes >= np.minimum(edges, magnitudes.max(axis=1))[:, None]) & (rows != 0)
        sums = np.where(kept, magnitudes, 0).sum(axis=1)
        return kept, (sums / np.maximum(kept.sum(axis=1), 1)).astype(np.float32)

    def _rows(self, values: Floats) -> Floats:
        """Return the values as (blocks, block), a copy with the last block zero-padded."""
        rows = np.zeros((-(-len(values) // self.block), self.block), np.float32)
        rows.reshape(-1)[: len(values)] = values
        return rows
