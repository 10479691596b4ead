"""Shamir's secret sharing of 32 bytes, over the integers modulo 2^256 + 297, the next prime.

Shamir, "How to share a secret" (1979).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297

SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, least: int, points: Sequence[int]) -> list[bytes]:
    """Return one share for each point.

    Parameters
    ----------
    secret : bytes
        32 bytes.
    least : int
        Shares that recover the secret; fewer say nothing about it.
    points
        Where the polynomial is evaluated: different integers of at least 1.
    """
    drawn = [secrets.randbelow(PRIME) for _ in range(least - 1)]
    values = evaluate([int.from_bytes(secret), *drawn], points)
    return [value.to_bytes(SHARE_BYTES) for value in values]


def evaluate(coefficients: Sequence[int], points: Sequence[int]) -> list[int]:
    """Return a polynomial's values at some points; the constant term is its first coefficient."""
    values = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        values.append(value)
    return values


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """Return what to multiply the values at some points by, so that they add up to that at 0.

    Lagrange's formula; one result serves all secrets whose shares lie at the same points.
    """
    weights = []
    for own in points:
        above = below = 1
        for other in points:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def combine(shares: Mapping[int, bytes], weights: Sequence[int] | None = None) -> bytes | None:
    """Return the secret of shares by their points; None if they are no shares of 32 bytes.

    Shares of fewer points than were required give another secret, or none.

    Parameters
    ----------
    weights, optional
        `weights_at_zero` of the points, in their order.
    """
    found = weights_at_zero(list(shares)) if weights is None else weights
    pairs = zip(found, shares.values(), strict=True)
    total = sum(weight * int.from_bytes(share) for weight, share in pairs) % PRIME
    return total.to_bytes(SECRET_BYTES) if total < 2**256 else None
