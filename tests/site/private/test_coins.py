"""Coins that nobody can predict, and the units that they draw."""

from __future__ import annotations

import inspect
import os
import random

import numpy as np
import pytest
import torch

from grandrounds.site.private import coins
from grandrounds.site.private.coins import KeyedCoins, secret_coins
from grandrounds.site.private.poisson import drawn_units

CPU = torch.device("cpu")


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vector 1: key, nonce and counter 0 give 76 b8 e0 ad a0 f1 ..."""
    word = int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")
    assert KeyedCoins(bytes(32)).uniforms(1)[0] == (word >> 11) / 2**53


def test_coins_are_not_the_seed() -> None:
    """Seeding every generator that a run seeds gives other noise each time."""

    def noise() -> torch.Tensor:
        random.seed(42)
        np.random.seed(42)
        torch.manual_seed(42)
        return secret_coins().normals(4, CPU)

    assert not torch.equal(noise(), noise())


def test_sampling_secret_from_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is the operating system's, and nothing else is asked: no seed, no setting."""
    first, again = (drawn_units(1000, 0.1, secret_coins()) for _ in range(2))
    assert first != again
    assert not inspect.signature(secret_coins).parameters
    names = inspect.getsource(coins)
    assert not any(word in names for word in ("environ", "Config", "config", "getenv"))
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    assert secret_coins().uniforms(3).tolist() == KeyedCoins(bytes(32)).uniforms(3).tolist()


def test_values_do_not_repeat_over_chunks_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KeyedCoins(bytes(32)).uniforms(300)
    monkeypatch.setitem(coins.CHUNK_VALUES, "cpu", 64)
    assert KeyedCoins(bytes(32)).uniforms(300).tolist() == whole.tolist()
    monkeypatch.setattr(coins, "STREAM_BYTES", 8 * 64)
    assert len(set(KeyedCoins(bytes(32)).uniforms(300).tolist())) == 300


def test_uniforms_are_uniform_and_normals_normal() -> None:
    """Moments within 4 standard errors: 1/3 of u^2; 0, 1 and 3 of z, z^2 and z^4."""
    made = KeyedCoins(b"k" * 32)
    u, z = made.uniforms(100_000), made.normals(300_000, CPU).numpy()
    assert 0 <= u.min() < u.max() < 1
    assert np.mean(u**2) == pytest.approx(1 / 3, abs=4 * 0.298 / 100_000**0.5)
    for power, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert np.mean(z**power) == pytest.approx(expected, abs=4 * deviation / 300_000**0.5)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / 300_000**0.5


def test_batches_are_poisson_samples() -> None:
    """10,000 batches of 200 units at 0.1: sizes are binomial, with mean 20 and variance 18."""
    made = KeyedCoins(b"p" * 32)
    sizes = np.array([len(drawn_units(200, 0.1, made)) for _ in range(10_000)])
    assert sizes.mean() == pytest.approx(20, abs=3 * (18 / 10_000) ** 0.5)
    assert sizes.var() == pytest.approx(18, abs=3 * 18 * (2 / 10_000) ** 0.5)


def test_cursor_is_not_poisson() -> None:
    """A cursor takes every unit once an epoch, in batches of one size; Poisson does not."""
    made = KeyedCoins(b"c" * 32)
    epoch = [drawn_units(40, 0.1, made) for _ in range(10)]
    taken = [unit for batch in epoch for unit in batch]
    assert len({len(batch) for batch in epoch}) > 2
    assert len(set(taken)) < len(taken)  # some twice
    assert len(set(taken)) < 40  # and some never
    assert drawn_units(40, 1.0, made) == list(range(40))
    assert drawn_units(0, 0.5, made) == []
