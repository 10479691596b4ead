"""A codec's settings, and the interface that its file implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import CommunicationConfig
from grandrounds.errors import nearest

CHUNK = 65536
"""Values processed at a time, so that intermediates stay in the cache; a multiple of every block
size."""


@dataclass(frozen=True)
class Codec:
    """How a vector is encoded."""

    name: str
    """One of `CODECS`."""
    block: int
    """Values per scale (int8, int4, int2, ternary, sign; kept values in topk): a power of two from
    8 to 65,536."""
    kept_share: float
    """Share of the values that topk keeps, by magnitude: above 0, at most 1."""
    entropy_coding: bool
    """Whether to compress with zstandard where that makes the payload smaller."""

    def __post_init__(self) -> None:
        """Reject settings that no codec supports."""
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
    """What `make(codec)` in a codec's file returns."""

    def body_bytes(self, count: int) -> int:
        """Return the exact length of a body."""

    def encode(
        self, values: NDArray[np.float32], generator: np.random.Generator, body: NDArray[np.uint8]
    ) -> None:
        """Fill a body of the right length."""

    def decode(self, body: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
        """Return finite values from a body of the right length, or raise ReplyError."""
