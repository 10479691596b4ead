"""Codecs: a flat float32 vector as bytes, smaller, and back.

    payload = one byte: 0, or 1 where the body went through zstandard | body

The length of a body follows from the codec and the number of values. What arrives is checked
against it before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from grandrounds.config.keys import CommunicationConfig
from grandrounds.errors import ReplyError, nearest
from grandrounds.wire.codecs.blocks import CHUNK, Blocks
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.codecs.plain import BFloat16, Raw
from grandrounds.wire.codecs.ternary import Ternary
from grandrounds.wire.codecs.topk import TopK

RAW, ZSTANDARD = 0, 1
"""The first byte of a payload."""

ZSTANDARD_LEVEL = 1
"""The codes are close to random: what is won is won by the Huffman coding that every level has."""


@dataclass(frozen=True)
class Codec:
    """How a vector is written."""

    name: str
    """One of `CODECS`."""
    block: int
    """Values that share one scale (int8, int4, int2, ternary, sign; of topk those kept): a power of
    two from 8 to 65,536."""
    kept_share: float
    """Share of the values that topk keeps, by magnitude: above 0, at most 1."""
    entropy_coding: bool
    """Whether the result goes through zstandard where that makes it smaller."""

    def __post_init__(self) -> None:
        """Refuse what no codec can do."""
        if self.name not in CODECS:
            hint = nearest(self.name, CODECS)
            raise ValueError(f"codec {self.name!r} is not one of {', '.join(CODECS)}.{hint}")
        if not 8 <= self.block <= CHUNK or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two from 8 to {CHUNK}, not {self.block}")
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share must be above 0 and at most 1, not {self.kept_share}")


def codec_named(name: str, how: CommunicationConfig) -> Codec:
    """Return a codec with the configured block size, share and entropy coding."""
    return Codec(name, how.block_size, how.kept_share, how.entropy_coding)


class Coding(Protocol):
    """What a codec provides; a new one is one class and one entry in `_CODINGS`."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean of the decoded values, over the generator, is the value."""

    def body_bytes(self, count: int) -> int:
        """Return the exact length of a body."""

    def encode(
        self, values: NDArray[np.float32], generator: np.random.Generator, body: NDArray[np.uint8]
    ) -> None:
        """Fill a body of the right length."""

    def decode(self, body: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
        """Return finite values from a body of the right length, or raise ReplyError."""

    def worst_error(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the largest |decoded - value| of each value."""


_CODINGS: dict[str, Callable[[Codec], Coding]] = {
    "none": lambda codec: Raw(),
    "float32": lambda codec: Raw(),
    "bf16": lambda codec: BFloat16(),
    "int8": lambda codec: Blocks(8, codec.block),
    "int4": lambda codec: Blocks(4, codec.block),
    "int2": lambda codec: Blocks(2, codec.block),
    "ternary": lambda codec: Ternary(codec.block),
    "sign": lambda codec: Blocks(1, codec.block),
    "topk": lambda codec: TopK(codec.kept_share, Blocks(4, codec.block)),
}

CODECS: tuple[str, ...] = tuple(_CODINGS)
"""The names of the codecs."""


def is_unbiased(name: str) -> bool:
    """Return whether the mean of the decoded values, over the generator, is the value.

    Up to 2**-16 of a step for the randomly rounded ones, and up to 2**-9 of the value for bf16,
    which is not random.
    """
    return _CODINGS[name](Codec(name, block=64, kept_share=1.0, entropy_coding=False)).unbiased


def encoded_bytes(codec: Codec, count: int) -> int:
    """Return the length of a payload of this many values; with entropy coding the largest one."""
    _check_count(count)
    return 1 + _CODINGS[codec.name](codec).body_bytes(count)


def encode(
    codec: Codec, values: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return a vector as bytes.

    Parameters
    ----------
    values : (count,) float32 array
        Finite; at least one.
    generator : numpy.random.Generator
        Where random rounding draws from; the same state gives the same bytes.

    Raises
    ------
    ValueError
        If the values are not float32, not one-dimensional, none, or not all finite.
    """
    if values.dtype != np.float32 or values.ndim != 1:
        raise ValueError(f"expected a float32 vector, not {values.dtype} of shape {values.shape}")
    _check_count(len(values))
    values = np.ascontiguousarray(values)
    if not all_finite(values):
        wrong = int((~np.isfinite(values)).sum())
        raise ValueError(f"{wrong} of {len(values)} values are not finite")
    payload = np.empty(encoded_bytes(codec, len(values)), np.uint8)
    payload[0] = RAW
    _CODINGS[codec.name](codec).encode(values, generator, payload[1:])
    if codec.entropy_coding:
        packed = zstandard.ZstdCompressor(level=ZSTANDARD_LEVEL).compress(payload[1:].data)
        if len(packed) < len(payload) - 1:
            return np.frombuffer(bytes([ZSTANDARD]) + packed, np.uint8)
    return payload


def decode(
    codec: Codec, payload: NDArray[np.uint8] | memoryview | bytes, count: int
) -> NDArray[np.float32]:
    """Return the vector of `count` values that a payload from elsewhere holds.

    All values are finite. No more is allocated than `count` values need.

    Raises
    ------
    ReplyError
        If these bytes are not such a payload.
    """
    _check_count(count)
    coding = _CODINGS[codec.name](codec)
    data = np.frombuffer(payload, np.uint8)
    length = coding.body_bytes(count)
    if not len(data) or data[0] > (ZSTANDARD if codec.entropy_coding else RAW):
        kinds = "0 or 1" if codec.entropy_coding else "0"
        raise ReplyError(
            f"{codec.name}: a payload must begin with the byte {kinds}, got {bytes(data[:1])!r}"
        )
    if data[0] == ZSTANDARD:
        body = _decompressed(data[1:], length, codec.name)
    else:
        body = data[1:]
        if len(body) != length:
            raise ReplyError(
                f"{codec.name}: {count} values take {1 + length} bytes, got {len(data)}"
            )
    try:
        return coding.decode(body, count)
    except ReplyError as error:
        raise ReplyError(f"{codec.name}: {error}") from error


def worst_error(codec: Codec, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the largest |decoded - value| that each value can meet, whatever is drawn."""
    return _CODINGS[codec.name](codec).worst_error(values)


def _decompressed(frame: NDArray[np.uint8], length: int, name: str) -> NDArray[np.uint8]:
    """Return the body in a zstandard frame that declares exactly its length."""
    if len(frame) >= length:
        raise ReplyError(
            f"{name}: {len(frame)} bytes of zstandard, where {length} would do without"
        )
    try:
        declared = zstandard.get_frame_parameters(frame.data).content_size
        if declared != length:
            raise ReplyError(f"{name}: the frame declares {declared} bytes, expected {length}")
        body = zstandard.ZstdDecompressor().decompress(
            frame.data, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ReplyError(f"{name}: not a zstandard frame: {error}") from error
    return np.frombuffer(body, np.uint8)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"a vector has at least 1 value, not {count}")
