"""Quantisation to a few bits per value with one scale per block: int8, int4, int2 and sign.

    body = largest scale (float32) | one byte of scale per block | the codes, packed

A code c of b bits stands for (c - h) / h times the scale of its block, h = (2**b - 1) / 2: evenly
spaced from minus the scale to plus the scale. With b = 1 that is the sign. Every code is
valid, so any bytes decode to finite values. Zero has no code of its own: it is rounded at random to
h - 1/2 or h + 1/2, and is exact only in a block of zeros.

int8, int4 and int2 use the block's largest magnitude as its scale and round stochastically to one
of the two neighbouring levels, which is unbiased (QSGD: Alistarh et al., 2017, section 3.1, with
the largest magnitude in place of the 2-norm). A value is off by less than a step, 2 / (2**b - 1)
of the scale; steps are multiples of 2**-149, float32's smallest number, which adds up to
(2**b - 1) * 2**-149: as much as the values themselves where these are subnormal. Sign uses the mean
magnitude, the scale with the least squared error (EF-signSGD: Karimireddy et al., 2019, algorithm
1, per block).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grandrounds.errors import ReplyError
from grandrounds.wire.codecs.codec import CHUNK, Codec

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

BITS = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}
"""Bits per code. Values are packed in chunks: byte i of a chunk of int4 holds value i in its low
bits and value i + CHUNK / 2 in its high bits; int2 and sign likewise by quarters and eighths."""

SCALES_PER_OCTAVE = 12
"""Neighbouring scales differ by 2**(1/12): 5.9 %."""

DITHER_BITS = 16
"""Resolution of stochastic rounding: the bias is at most 2**-16 of a step."""


def scale_table(largest: np.float32) -> Floats:
    """Return the 256 scales of a message, ascending: 0 for code 0, `largest` for code 255.

    Code c from 1 stands for largest * 2**((c - 255) / 12); the smallest is 2**-21.2 of the largest.
    Above that, a scale rounded up is at most 2**(1/12) - 1 = 5.9 % too large, and the nearest one
    at most (2**(1/12) - 1) / 2 = 3.0 % off.
    """
    exponents = (np.arange(256) - 255) / SCALES_PER_OCTAVE
    table: Floats = (np.float64(largest) * np.exp2(exponents)).astype(np.float32)
    table[0] = 0.0
    return table


def largest_scale(body: Bytes) -> np.float32:
    """Read the largest scale, with which a body begins.

    Raises
    ------
    ReplyError
        If it is negative or not finite.
    """
    largest = np.frombuffer(body[:4].tobytes(), "<f4")[0]
    if not 0 <= largest < np.inf:
        raise ReplyError(f"the largest scale is {largest}; it must be finite and at least 0")
    return np.float32(largest)


def make(codec: Codec) -> Blocks:
    """Return the codec with its number of bits per code."""
    return Blocks(BITS[codec.name], codec.block)


@dataclass(frozen=True)
class Blocks:
    """Codes of 1, 2, 4 or 8 bits; `block` consecutive values share a scale."""

    bits: int
    """1 (sign), 2, 4 or 8."""
    block: int
    """A power of two, from 8 to `CHUNK`."""

    @property
    def unbiased(self) -> bool:
        """Whether the rounding is unbiased: all codecs but sign."""
        return self.bits > 1

    @property
    def _half(self) -> np.float32:
        return np.float32(((1 << self.bits) - 1) / 2)

    def body_bytes(self, count: int) -> int:
        """Return the exact length for this many values."""
        return 4 + _ceil(count, self.block) + _ceil(count * self.bits, 8)

    def encode(self, values: Floats, generator: np.random.Generator, body: Bytes) -> None:
        """Write the scales and the codes into `body`."""
        sizes = self._sizes(values)
        largest = sizes.max()
        table = scale_table(largest)
        edges = table if self.unbiased else (table[:-1].astype(np.float64) + table[1:]) / 2
        scales = np.searchsorted(edges, sizes).astype(np.uint8)
        body[:4] = np.frombuffer(largest.astype("<f4").tobytes(), np.uint8)
        body[4 : 4 + len(scales)] = scales
        table[0] = 1.0  # avoids 0 / 0 in a block of zeros
        divisors = table[scales][:, None]
        scratch, codes = np.empty(CHUNK, np.float32), np.zeros(CHUNK, np.uint8)
        for part, blocks, packed in self._chunks(body, len(values)):
            rows = self._rows(values[part], scratch)
            if self.unbiased:
                ratios = scratch[: rows.size]
                np.divide(rows, divisors[blocks], out=ratios.reshape(rows.shape))
                self._round(ratios, generator, codes)
                codes[: rows.size].reshape(rows.shape)[scales[blocks] == 0] = 0  # exact zeros
            else:
                np.greater_equal(rows.reshape(-1), 0, out=codes[: rows.size].view(np.bool_))
            self._pack(codes, packed)

    def decode(self, body: Bytes, count: int) -> Floats:
        """Return the values.

        Raises
        ------
        ReplyError
            If the largest scale is negative or not finite.
        """
        largest = largest_scale(body)
        scales = body[4 : 4 + _ceil(count, self.block)]
        widest = (1 << self.bits) - 1
        steps = _rounded_down(scale_table(largest) / np.float64(widest))[scales][:, None]
        out = np.empty(count, np.float32)
        scratch, codes = np.empty(CHUNK, np.float32), np.zeros(CHUNK, np.uint8)
        for part, blocks, packed in self._chunks(body, count):
            self._unpack(packed, codes)
            rows = self._rows(out[part], scratch)
            rows[:] = codes[: rows.size].reshape(rows.shape)
            rows -= self._half
            rows += rows  # odd integers from -widest to widest
            rows *= steps[blocks]
            if rows.size > len(out[part]):
                out[part] = scratch[: len(out[part])]
        return out

    def _sizes(self, values: Floats) -> Floats:
        """Return each block's largest magnitude; for sign, its mean magnitude."""
        sizes = np.empty(_ceil(len(values), self.block), np.float32)
        scratch = np.empty(CHUNK, np.float32)
        for start in range(0, len(values), CHUNK):
            rows = self._rows(values[start : start + CHUNK], scratch)
            magnitudes = np.abs(rows, out=scratch[: rows.size].reshape(rows.shape))
            first = start // self.block
            target = sizes[first : first + len(rows)]
            if self.unbiased:
                np.maximum.reduce(magnitudes, axis=1, out=target)
            else:
                target[:] = np.add.reduce(magnitudes, axis=1, dtype=np.float64) / self.block
        if not self.unbiased:
            last = values[(len(sizes) - 1) * self.block :]  # may be short
            sizes[-1] = np.abs(last).mean(dtype=np.float64)
        return sizes

    def _rows(self, values: Floats, scratch: Floats) -> Floats:
        """Return a chunk as (blocks, block); a short last block is zero-padded in `scratch`."""
        if len(values) % self.block == 0:
            return values.reshape(-1, self.block)
        padded = scratch[: _ceil(len(values), self.block) * self.block]
        padded[: len(values)] = values
        padded[len(values) :] = 0
        return padded.reshape(-1, self.block)

    def _chunks(self, body: Bytes, count: int) -> Iterator[tuple[slice, slice, Bytes]]:
        """Yield the values, the blocks and the packed bytes of each chunk."""
        packed = body[4 + _ceil(count, self.block) :]
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            blocks = slice(start // self.block, _ceil(stop, self.block))
            first, stop_byte = start * self.bits // 8, _ceil(stop * self.bits, 8)
            yield slice(start, stop), blocks, packed[first:stop_byte]

    def _round(self, ratios: Floats, generator: np.random.Generator, codes: Bytes) -> None:
        """Round ratios from -1 to 1 stochastically to codes, in 16-bit fixed point.

        code = floor((ratio + 1) * h + u), u uniform in [0, 1), both in multiples of 2**-16. At
        the largest ratio, 1, that is 2h + u before the floor: never above the largest code.
        """
        fixed = self._half * np.float32(1 << DITHER_BITS)
        ratios *= fixed
        ratios += fixed + np.float32(0.5)  # the cast truncates: rounds to nearest
        levels = ratios.astype(np.int32)
        draws = generator.integers(0, 2**64 - 1, _ceil(len(levels), 4), np.uint64, endpoint=True)
        levels += draws.view(np.uint16)[: len(levels)]
        levels >>= DITHER_BITS
        codes[: len(levels)] = levels

    def _pack(self, codes: Bytes, packed: Bytes) -> None:
        planes = codes[: len(packed) * 8 // self.bits].reshape(-1, len(packed))
        packed[:] = planes[0]
        for place, plane in enumerate(planes[1:], 1):
            packed |= plane << (place * self.bits)

    def _unpack(self, packed: Bytes, codes: Bytes) -> None:
        planes = codes[: len(packed) * 8 // self.bits].reshape(-1, len(packed))
        for place, plane in enumerate(planes):
            np.right_shift(packed, place * self.bits, out=plane)
            plane &= (1 << self.bits) - 1


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)


def _rounded_down(values: NDArray[np.float64]) -> Floats:
    """Cast to float32 rounding down, so that the widest level never exceeds the scale."""
    nearest = values.astype(np.float32)
    return np.where(nearest > values, np.nextafter(nearest, np.float32(0)), nearest)
