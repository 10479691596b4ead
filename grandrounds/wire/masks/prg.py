"""The key stream of ChaCha20 as integers, added to a vector modulo 2^32 or 2^16 (RFC 8439)."""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

CHUNK_BYTES = 2**17
"""Key stream produced at once: small enough to stay in a core's cache until it is added."""

_ZEROS = bytes(CHUNK_BYTES)
_NONCE = bytes(16)
"""A block counter of 4 bytes and a nonce of 12, both zero: a key serves one vector."""

Vector = NDArray[np.unsignedinteger[Any]]
"""uint32 or uint16, little-endian."""


class Stream:
    """The key stream of a key of 32 bytes, read once from its beginning."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(key, _NONCE), None).encryptor()

    def fill(self, out: Vector) -> None:
        """Fill a contiguous vector with the next bytes of the stream."""
        whole = out.view(np.uint8)
        for start in range(0, len(whole), CHUNK_BYTES):
            part = whole[start : start + CHUNK_BYTES]
            self._cipher.update_into(memoryview(_ZEROS)[: len(part)], part.data)


def add_mask(vector: Vector, key: bytes, sign: int) -> None:
    """Add a key's mask to a vector in place, or subtract it.

    Parameters
    ----------
    vector
        One-dimensional and contiguous; sums wrap around.
    sign : int
        1 or -1.
    """
    stream = Stream(key)
    size = CHUNK_BYTES // vector.itemsize
    scratch = np.empty(min(size, len(vector)), dtype=vector.dtype)
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(vector), size):
        part = vector[start : start + size]
        mask = scratch[: len(part)]
        stream.fill(mask)
        combine(part, mask, out=part)
