"""Codecs: compress a flat float32 vector into bytes, and decode it.

    payload = one byte (0: plain, 1: zstandard-compressed body) | body

The codec and the number of values determine the length of the body. A received payload is checked
against it before anything is allocated.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.errors import ReplyError
from grandrounds.wire.codecs.codec import Codec, Coding
from grandrounds.wire.codecs.finite import all_finite

RAW, ZSTANDARD = 0, 1
"""The first byte of a payload."""

ZSTANDARD_LEVEL = 1
"""Codes are close to random, so the gain comes from Huffman coding, which every level includes."""


@lru_cache(maxsize=64)
def coding_of(codec: Codec) -> Coding:
    """Return a codec's implementation, built by `make` in its file."""
    module = importlib.import_module(f"{__name__}.{CODECS[codec.name].file}")
    return cast(Coding, module.make(codec))


def encoded_bytes(codec: Codec, count: int) -> int:
    """Return the payload length for this many values; the maximum with entropy coding."""
    _check_count(count)
    return 1 + coding_of(codec).body_bytes(count)


def encode(
    codec: Codec, values: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Encode a vector as a payload.

    Parameters
    ----------
    values : (count,) float32 array
        Finite; at least one.
    generator : numpy.random.Generator
        Source of stochastic rounding; the same state gives the same bytes.

    Raises
    ------
    ValueError
        If the vector is empty, not float32, not one-dimensional or not finite.
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
    coding_of(codec).encode(values, generator, payload[1:])
    if codec.entropy_coding:
        packed = zstandard.ZstdCompressor(level=ZSTANDARD_LEVEL).compress(payload[1:].data)
        if len(packed) < len(payload) - 1:
            return np.frombuffer(bytes([ZSTANDARD]) + packed, np.uint8)
    return payload


def decode(
    codec: Codec, payload: NDArray[np.uint8] | memoryview | bytes, count: int
) -> NDArray[np.float32]:
    """Decode an untrusted payload into a vector of `count` values.

    All values are finite. Allocates no more than `count` values need.

    Raises
    ------
    ReplyError
        If the bytes are not a valid payload of this codec.
    """
    _check_count(count)
    coding = coding_of(codec)
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


def _decompressed(frame: NDArray[np.uint8], length: int, name: str) -> NDArray[np.uint8]:
    """Decompress a zstandard frame, which must declare exactly this length."""
    if len(frame) >= length:
        raise ReplyError(
            f"{name}: a zstandard frame of {len(frame)} bytes is no smaller than the plain {length}"
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
