"""Shamir's secret sharing, by hand."""

from __future__ import annotations

import itertools

import pytest

from grandrounds.wire.masks import shamir
from grandrounds.wire.masks.shamir import PRIME, combine, evaluate, split, weights_at_zero


def as_share(value: int) -> bytes:
    return value.to_bytes(shamir.SHARE_BYTES)


def test_a_line_worked_out_by_hand() -> None:
    """7 + 3x is 10, 13, 16 at 1, 2, 3; through (1, 10) and (3, 16) it is 7 at 0.

    Lagrange: 10 · 3/(3 - 1) + 16 · 1/(1 - 3) = 15 - 8 = 7.
    """
    assert evaluate([7, 3], [1, 2, 3]) == [10, 13, 16]
    assert combine({1: as_share(10), 3: as_share(16)}) == (7).to_bytes(32)
    assert [weight * 2 % PRIME for weight in weights_at_zero([1, 3])] == [3, PRIME - 1]


def test_a_parabola_worked_out_by_hand_modulo_the_prime() -> None:
    """(p - 1) + 2x + x² is 2 - 1 + 1 = 2 at 1, 7 at 2, 14 at 3."""
    assert evaluate([PRIME - 1, 2, 1], [1, 2, 3]) == [2, 7, 14]
    shares = {1: as_share(2), 2: as_share(7), 3: as_share(14)}
    assert combine(shares) is None  # p - 1 is more than 256 bits


def test_the_modulus_is_prime() -> None:
    """Miller and Rabin: p - 1 = 8 d with d odd, to 40 bases."""
    odd = (PRIME - 1) // 8
    assert odd % 2 == 1
    for base in range(2, 42):
        x = pow(base, odd, PRIME)
        assert x in (1, PRIME - 1) or pow(x, 2, PRIME) == PRIME - 1 or pow(x, 4, PRIME) == PRIME - 1


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_every_set_of_enough_shares_gives_the_secret_and_no_smaller_one(secret: bytes) -> None:
    points = [1, 2, 5, 9, 256]
    shares = dict(zip(points, split(secret, 3, points), strict=True))
    assert all(len(share) == shamir.SHARE_BYTES for share in shares.values())
    for chosen in itertools.combinations(points, 3):
        assert combine({point: shares[point] for point in chosen}) == secret
    for chosen in itertools.combinations(points, 2):
        assert combine({point: shares[point] for point in chosen}) != secret


def test_shares_of_the_same_secret_differ_each_time() -> None:
    assert split(bytes(32), 2, [1]) != split(bytes(32), 2, [1])
