"""Client updates as fixed-point numbers modulo 2^32 or 2^16, so that sums under masks are exact.

A site sends q(w x / W) for each value x of its change, where w is its weight and W the largest
weight, and beside them w itself and the count of values that it cut to the range. Whoever has the
sum of n sites divides it by the sum of their weights.

The range R is public and stands before anybody trains, so that n sites at R never wrap around.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import Config
from grandrounds.errors import ReplyError

if TYPE_CHECKING:
    from grandrounds.wire.masks.prg import Vector

BITS = {"masked32": 32, "masked16": 16}
"""Codec → bits of a number."""

COUNT_BITS = 32
"""Weights and counts are below 2^32."""

COUNTS = 2
"""Counts beside the values: the weight, and how many values were cut."""

SQUARES = 2
"""Counts more where the rule needs them: w |d|^2 and w^2, as shares of their largest values."""

CHUNK_VALUES = 2**16

_ONE = 2**COUNT_BITS - 1
"""The share 1 as a count."""

RANGE_STEPS = 4.0
"""Learning rates a step: more than AdamW moves a value by, whatever the gradients, in a visit of at
most `SURE_STEPS` steps without weight decay.

Step t of a fresh AdamW moves a value by at most the learning rate times

    r(t) = (1 - b1) / sqrt(1 - b2) * sqrt((1 - q^t) / (1 - q)) * sqrt(1 - b2^t) / (1 - b1^t),

q = b1^2 / b2: Cauchy and Schwarz on both moments, with their bias corrections. r is 1 at the first
step and 7.27 in the limit at b1 = 0.9, b2 = 0.999, which all sites use. (The 3.16 of Kingma and
Ba 2015, section 2.1, is for gradients that were 0 until then.)
"""

SURE_STEPS = 862
"""Steps T up to which r(1) + ... + r(T) is at most 4 T; it is 4.001 T at the next one."""


def largest_change(learning_rate: float, steps: int) -> float:
    """Return the most that a visit of Adam steps can move a value, without weight decay.

    Parameters
    ----------
    learning_rate : float
        The largest one of the visit.
    """
    return RANGE_STEPS * learning_rate * steps


@dataclass(frozen=True)
class FixedPoint:
    """The numbers of a masked vector. Both ends derive it from what is public."""

    codec: str
    """`masked32` or `masked16`."""
    sites: int
    """Largest number of vectors in a sum."""
    values: int
    """Values of a change."""
    largest_value: float
    """Range R of a value; sites cut what lies beyond."""
    most_weight: int
    """Largest weight W of a site."""
    has_squares: bool = False
    """Whether the sums of w |d|^2 and w^2 travel too, as FedExP needs them."""

    def __post_init__(self) -> None:
        fits = self.sites >= 1 and self.values >= 1 and 1 <= self.most_weight < 2**COUNT_BITS
        if not (fits and 0 < self.largest_value < math.inf):
            raise ValueError(f"no fixed-point numbers for {self}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a masked vector."""
        return np.dtype(f"<u{BITS[self.codec] // 8}")

    @property
    def most(self) -> int:
        """Largest integer of one site: n of them are below half of the modulus."""
        return int((2 ** (BITS[self.codec] - 1) - 1) // self.sites)

    @property
    def fraction_bits(self) -> int:
        """Bits after the binary point: as many as the range leaves."""
        bits = math.frexp(self.most / self.largest_value)[1] - 1
        return bits if math.ldexp(self.largest_value, bits) <= self.most else bits - 1

    @property
    def limb_bits(self) -> int:
        """Bits of a count in one number, so that n of them stay below the modulus."""
        return BITS[self.codec] - (self.sites - 1).bit_length()

    @property
    def limbs(self) -> int:
        """Numbers that a count takes."""
        return math.ceil(COUNT_BITS / self.limb_bits)

    @property
    def length(self) -> int:
        """Numbers of a vector."""
        return self.values + (COUNTS + SQUARES * self.has_squares) * self.limbs

    @property
    def size_bytes(self) -> int:
        """Bytes of a vector."""
        return self.length * self.dtype.itemsize

    def encode(
        self, change: NDArray[np.float32], weight: int, coins: bytes | None = None
    ) -> Vector:
        """Return a site's vector before it is masked.

        Parameters
        ----------
        change
            Of (values).
        weight : int
            From 1; one above the largest weight counts as that.
        coins : bytes, optional
            Key of the stochastic rounding of `masked16`; default: 256 bits of the operating system.

        Raises
        ------
        ReplyError
            If a value is not finite.
        """
        from grandrounds.wire.masks.prg import Stream  # plans do without cryptography

        weight = min(weight, self.most_weight)
        factor = math.ldexp(weight / self.most_weight, self.fraction_bits)
        is_coarse = self.codec == "masked16"
        stream = Stream(coins or os.urandom(32)) if is_coarse else None
        out = np.empty(self.length, dtype=self.dtype)
        signed = out.view(f"<i{self.dtype.itemsize}")
        clipped, square = 0, 0.0
        for start in range(0, self.values, CHUNK_VALUES):
            part = change[start : start + CHUNK_VALUES].astype(np.float64)
            if not np.isfinite(part).all():
                raise ReplyError("the change of the adapter has values that are not finite")
            clipped += int(np.count_nonzero(np.abs(part) > self.largest_value))
            part.clip(-self.largest_value, self.largest_value, out=part)
            if self.has_squares:
                scaled = part / self.largest_value
                square += float(scaled @ scaled) / self.values
            part *= factor
            if stream is not None:
                drawn = np.empty(len(part), dtype="<u4")
                stream.fill(drawn)
                part += drawn * 2.0**-32
                np.floor(part, out=part)
            else:
                np.rint(part, out=part)
            signed[start : start + len(part)] = part
        counts = [weight, clipped]
        if self.has_squares:
            share = weight / self.most_weight
            counts += [int(share * square * _ONE), int(share * share * _ONE)]
        out[self.values :] = [limb for count in counts for limb in self._in_limbs(count)]
        return out

    def decode(self, total: Vector) -> Sum:
        """Return what a sum of vectors says, once its masks are gone.

        Raises
        ------
        ReplyError
            If the weights add up to nothing.
        """
        counts = range(COUNTS + SQUARES * self.has_squares)
        weight, clipped, *squares = (
            self._from_limbs(total[self.values + i * self.limbs :]) for i in counts
        )
        if not weight:
            raise ReplyError("the weights of a masked sum add up to 0")
        signed = total[: self.values].view(f"<i{self.dtype.itemsize}")
        unit = math.ldexp(self.most_weight / weight, -self.fraction_bits)
        mean = (signed * unit).astype(np.float32)
        if not squares:
            return Sum(mean, weight, clipped)
        share = weight / self.most_weight
        longest = self.values * self.largest_value**2
        square, squared_shares = squares[0] / _ONE / share * longest, squares[1] / _ONE / share**2
        return Sum(mean, weight, clipped, square, squared_shares)

    def _in_limbs(self, count: int) -> list[int]:
        size = self.limb_bits
        return [count >> (i * size) & (2**size - 1) for i in range(self.limbs)]

    def _from_limbs(self, numbers: Vector) -> int:
        limbs = map(int, numbers[: self.limbs])
        return sum(limb << (i * self.limb_bits) for i, limb in enumerate(limbs))


@dataclass(frozen=True)
class Sum:
    """What the server learns of a cohort."""

    mean: NDArray[np.float32]
    """Weighted mean of the changes: (values)."""
    weight: int
    """Sum of the weights."""
    clipped: int
    """Values that the sites cut to the range, all sites together."""
    square: float = 0.0
    """Weighted mean of the squared lengths of the changes, where the numbers have squares."""
    squared_shares: float = 0.0
    """Sum of the squared shares of the weights, likewise."""


def numbers_of(
    config: Config, learning_rate: float, sites: int, values: int, most_weight: int
) -> FixedPoint:
    """Return the fixed-point numbers of a round.

    Parameters
    ----------
    learning_rate : float
        The round's.
    sites : int
        Sites in the list of keys.
    values : int
        Values of a change.
    """
    # at a rate of 0, that of a last round, nothing moves, and any range holds it
    largest = largest_change(learning_rate, config.arguments.max_steps) or 1.0
    codec = config.federation.secure_aggregation
    squares = config.strategy.name == "fedexp"
    return FixedPoint(codec, sites, values, largest, most_weight, squares)
