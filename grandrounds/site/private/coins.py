"""Secret coins: random numbers that nobody can predict, for the noise and the choice of units.

A guarantee holds only while noise and choice are unknown to whoever sees the result. The server
knows a run's seed, so nothing here comes from one: ChaCha20 (RFC 8439) under a key of the operating
system. No setting of a run, a site or a node reaches these coins.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

DRAWS = 4
"""Normal draws that are summed for one value. The bits of a single one tell too much of how it was
computed (Holohan and Braghin, Secure random sampling in differential privacy, 2021, section 4)."""

CHUNK_VALUES = {"cpu": 2**16, "cuda": 2**20}
"""Values computed at once by type of device: 2 MiB of key stream, which a CPU's cache holds."""

STREAM_BYTES = 2**34
"""Bytes taken from one nonce; ChaCha20's block counter allows 2**38."""


class Coins(Protocol):
    """A source of independent random numbers."""

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return numbers uniform in [0, 1), multiples of 2**-53."""

    def normals(self, count: int, device: torch.device) -> torch.Tensor:
        """Return standard normal numbers: float64 of (count)."""


def secret_coins() -> Coins:
    """Return coins under a fresh key of the operating system."""
    return KeyedCoins(os.urandom(32))


class KeyedCoins:
    """The key stream of ChaCha20 as random numbers; secret as long as its key is.

    Parameters
    ----------
    key : bytes
        32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._stream, self._zeros = key, 0, b""
        self._start()

    def _start(self) -> None:
        # RFC 8439: a block counter of 4 bytes, then the nonce of 12.
        nonce = bytes(4) + self._stream.to_bytes(12, "little")
        self._cipher = Cipher(algorithms.ChaCha20(self._key, nonce), None).encryptor()
        self._left = STREAM_BYTES

    def _words(self, count: int) -> NDArray[np.int64]:
        """Return the next 64-bit words of the key stream."""
        if self._left < 8 * count:
            self._stream += 1
            self._start()
        self._left -= 8 * count
        if len(self._zeros) < 8 * count:
            self._zeros = bytes(8 * count)
        out = np.empty(count, dtype="<i8")
        self._cipher.update_into(memoryview(self._zeros)[: 8 * count], out.view(np.uint8).data)
        return out

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return numbers uniform in [0, 1), multiples of 2**-53."""
        size = CHUNK_VALUES["cpu"]
        parts = [
            (self._words(min(size, count - start)).view("<u8") >> np.uint64(11)) * 2.0**-53
            for start in range(0, count, size)
        ]
        return np.concatenate(parts) if parts else np.empty(0)

    def normals(self, count: int, device: torch.device) -> torch.Tensor:
        """Return standard normal numbers: float64 of (count).

        Each is half the sum of four: both results of two transforms of Box and Muller (1958), whose
        sum is one sine, cos(t) + sin(t) = sqrt(2) sin(t + pi / 4).
        """
        out = torch.empty(count, dtype=torch.float64, device=device)
        size = CHUNK_VALUES[device.type]
        for start in range(0, count, size):
            part = out[start : start + size]
            bits = torch.from_numpy(self._words(DRAWS * len(part))).to(device)
            # 52 bits after a 1: doubles in [1, 2) without a conversion
            bits.bitwise_and_(2**52 - 1).bitwise_or_(1023 << 52)
            first, second = bits.view(torch.float64).view(2, 2, len(part))
            # sqrt(-2 log u), the sine's sqrt(2) and the half of the sum together: sqrt(-log u)
            radius = first.neg_().add_(2.0).log_().neg_().sqrt_()  # (2, values)
            angle = second.mul_(2.0 * math.pi).add_(math.pi / 4)
            torch.sum(radius.mul_(angle.sin_()), dim=0, out=part)
        return out
