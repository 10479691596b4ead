"""Codecs: within the stated bound, of the stated length, and unmoved by hostile bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.errors import ReplyError
from grandrounds.wire import codecs
from grandrounds.wire.codecs.blocks import CHUNK, scale_table
from grandrounds.wire.codecs.codec import Codec
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.codecs.topk import position_bytes
from tests.wire.codec_bounds import worst_error

Array = NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)

FLOATS = st.floats(-LARGEST, LARGEST, width=32)  # subnormal numbers and both zeros among them
VECTORS = hnp.arrays(np.float32, st.integers(1, 300), elements=FLOATS)
SUBNORMAL = st.integers(-(2**12), 2**12).map(lambda units: float(np.float32(units * 2.0**-149)))
TINY = hnp.arrays(np.float32, st.integers(1, 40), elements=SUBNORMAL)
ANY_CODEC = st.builds(
    Codec,
    name=st.sampled_from(list(CODECS)),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    kept_share=st.floats(0.001, 1.0),
    entropy_coding=st.booleans(),
)


def codec(name: str, block: int = 64, entropy_coding: bool = False) -> Codec:
    return Codec(name, block=block, kept_share=0.05, entropy_coding=entropy_coding)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def there_and_back(how: Codec, values: Array, seed: int = 0) -> Array:
    payload = codecs.encode(how, values, np.random.default_rng(seed))
    return codecs.decode(how, payload, len(values))


@settings(max_examples=200, deadline=None)
@given(how=ANY_CODEC, values=VECTORS | TINY, seed=st.integers(0, 9))
def test_what_comes_back_is_within_the_stated_bound(how: Codec, values: Array, seed: int) -> None:
    before = values.tobytes()
    decoded = there_and_back(how, values, seed)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    assert (error <= worst_error(how, values)).all()
    assert values.tobytes() == before


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", [1, 3, 64, 67])
def test_the_largest_numbers_do_not_overflow(name: str, count: int) -> None:
    decoded = there_and_back(codec(name), np.full(count, -LARGEST, np.float32))
    assert np.isfinite(decoded).all()
    assert decoded.min() == pytest.approx(-LARGEST, rel=2**-8)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_vectors_of_several_chunks_keep_every_value_in_its_place(name: str, count: int) -> None:
    values = normal(count)
    error = np.abs(there_and_back(codec(name), values).astype(np.float64) - values)
    assert (error <= worst_error(codec(name), values)).all()


@settings(max_examples=150, deadline=None)
@given(how=ANY_CODEC, count=st.integers(1, 2000), seed=st.integers(0, 9))
def test_the_length_is_known_before_encoding(how: Codec, count: int, seed: int) -> None:
    payload = codecs.encode(how, normal(count, seed), np.random.default_rng(seed))
    assert payload.dtype == np.uint8
    assert payload.ndim == 1
    assert payload.flags.c_contiguous
    if how.entropy_coding:
        assert len(payload) <= codecs.encoded_bytes(how, count)
        assert payload[0] == (len(payload) < codecs.encoded_bytes(how, count))
    else:
        assert len(payload) == codecs.encoded_bytes(how, count)
        assert payload[0] == 0


def test_lengths_by_hand() -> None:
    """1,000 values: 16 blocks of 64, the last one short; one byte of kind, four of largest scale.

    topk keeps 50: floor(log2(1000 / 50)) = 4 low bits each, in 4 planes of 7 bytes; a bitmap of
    50 + (999 >> 4) = 112 bits = 14 bytes; 50 values of int4 in one block: 4 + 1 + 25.
    """
    lengths = {name: codecs.encoded_bytes(codec(name), 1000) for name in CODECS}
    assert lengths == {
        "none": 1 + 4000,
        "float32": 1 + 4000,
        "bf16": 1 + 2000,
        "int8": 1 + 4 + 16 + 1000,
        "int4": 1 + 4 + 16 + 500,
        "int2": 1 + 4 + 16 + 250,
        "ternary": 1 + 4 + 16 + 200,
        "sign": 1 + 4 + 16 + 125,
        "topk": 1 + 14 + 28 + 30,
    }
    assert position_bytes(1000, 50) == 14 + 28


def test_the_bytes_of_int4_by_hand() -> None:
    """16 values of magnitude 1, scale 1, codes 15 and 0; value i lies beside value i + 8."""
    values = np.array([1, -1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1], np.float32)
    payload = codecs.encode(codec("int4", 16), values, np.random.default_rng(0))
    packed = [0xFF, 0xF0, 0x0F, 0x0F, 0xFF, 0xFF, 0xFF, 0xFF]
    assert payload.tolist() == [0, *np.float32(1).tobytes(), 255, *packed]
    assert codecs.decode(codec("int4", 16), payload, 16) == pytest.approx(values, rel=2**-22)


def test_sign_by_hand() -> None:
    """Mean magnitude (1 + 3 + 0 + 4) / 4 = 2 of four values, whatever the block; 0 counts as +."""
    decoded = there_and_back(codec("sign"), np.array([1, -3, 0, 4], np.float32))
    assert decoded.tolist() == [2, -2, 2, 2]


@pytest.mark.parametrize("place", range(8))
def test_each_bit_of_a_sign_byte_is_one_value(place: int) -> None:
    values = -np.ones(8, np.float32)
    values[place] = 1
    payload = codecs.encode(codec("sign", 8), values, np.random.default_rng(0))
    assert payload[-1] == 1 << place


def test_topk_keeps_the_largest_and_of_equals_the_first() -> None:
    values = np.zeros(40, np.float32)
    values[[3, 17, 30, 39]] = [2, -2, 2, 1]
    assert np.flatnonzero(there_and_back(codec("topk"), values)).tolist() == [3, 17]


def test_bf16_rounds_to_nearest_even() -> None:
    """bf16 near 1 has steps of 2**-7: halves go to the even neighbour."""
    step = 2.0**-7
    values = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, LARGEST], np.float32)
    decoded = there_and_back(codec("bf16"), values)
    assert decoded.tolist() == [1, 1 + 2 * step, 1 + step, (2 - 2.0**-7) * 2.0**127]


@pytest.mark.parametrize("name", CODECS)
def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    first, again, other = (
        codecs.encode(codec(name), normal(5000), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name in ("none", "float32", "bf16", "ternary", "sign"))


@pytest.mark.parametrize("name", CODECS)
def test_zeros_come_back_as_zeros(name: str) -> None:
    assert not there_and_back(codec(name), np.zeros(100, np.float32)).any()


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "ternary", "sign"])
def test_a_block_of_zeros_among_others_comes_back_as_zeros(name: str) -> None:
    values = normal(192)
    values[64:128] = 0
    decoded = there_and_back(codec(name), values)
    assert not decoded[64:128].any()
    assert decoded[:64].any()


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_the_mean_over_many_draws_is_the_value(name: str) -> None:
    """Of 2,000 draws the mean is within 5 standard errors of each of 64 values; a draw's standard
    deviation is at most half a step."""
    values, draws = normal(64), 2000
    generator = np.random.default_rng(7)
    how = codec(name)
    total = np.zeros(64)
    for _ in range(draws):
        total += codecs.decode(how, codecs.encode(how, values, generator), 64)
    half_step = worst_error(how, values) / 2
    assert (np.abs(total / draws - values) <= 5 * half_step / np.sqrt(draws)).all()


def test_scales_rise_by_six_percent_and_never_fall_short() -> None:
    """254 steps of 1/12 octave below the largest: 2**-21.17."""
    table = scale_table(np.float32(3.0)).astype(np.float64)
    assert table[0] == 0
    assert table[255] == 3
    assert table[2:] / table[1:-1] == pytest.approx(np.full(254, 2 ** (1 / 12)), rel=1e-6)
    assert np.log2(table[1] / 3) == pytest.approx(-254 / 12, rel=1e-6)


def test_mean_squared_errors_for_normal_values() -> None:
    """Relative to the mean square, measured, blocks of 64; sign is near 1 - 2/pi = 0.363."""
    values = normal(2**17)
    expected_by_name = {
        "int8": 7.5e-5,
        "int4": 0.0217,
        "int2": 0.541,
        "ternary": 0.262,
        "sign": 0.358,
    }
    for name, expected in expected_by_name.items():
        error = there_and_back(codec(name), values) - values
        assert (error**2).mean() / (values**2).mean() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CODECS)
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = normal(100)
    values[99] = bad
    with pytest.raises(ValueError, match="1 of 100 values are not finite"):
        codecs.encode(codec(name), values, np.random.default_rng(0))


@pytest.mark.parametrize(
    "values", [np.zeros(0, np.float32), np.zeros((2, 2), np.float32), np.zeros(3)]
)
def test_only_vectors_of_float32_are_encoded(values: Array) -> None:
    with pytest.raises(ValueError, match="vector"):
        codecs.encode(codec("int8"), values, np.random.default_rng(0))


def test_a_codec_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'int8'"):
        codec("int9")
    for block in (0, 7, 48, 2 * CHUNK):
        with pytest.raises(ValueError, match="block must be"):
            codec("int8", block)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="kept_share must be"):
            dataclasses.replace(codec("topk"), kept_share=share)


def test_all_finite_sees_large_numbers_as_finite() -> None:
    assert all_finite(np.full((2, 3), LARGEST, np.float32))
    assert not all_finite(np.array([LARGEST, np.nan], np.float32))
    assert not all_finite(np.array([1, -np.inf], np.float32))


def only_replies_fail(how: Codec, payload: bytes, count: int) -> None:
    """Decode: a finite vector of the right shape, or ReplyError."""
    try:
        decoded = codecs.decode(how, payload, count)
    except ReplyError:
        return
    assert decoded.shape == (count,)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), how=ANY_CODEC, count=st.integers(1, 200))
def test_random_bytes_decode_or_are_refused(data: st.DataObject, how: Codec, count: int) -> None:
    length = data.draw(st.sampled_from([codecs.encoded_bytes(how, count), 0, 1, 5, 40]))
    body = data.draw(st.binary(min_size=length, max_size=length))
    only_replies_fail(how, body, count)
    only_replies_fail(how, b"\0" + body[1:], count)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), how=ANY_CODEC, count=st.integers(1, 300))
def test_cut_and_flipped_payloads_decode_or_are_refused(
    data: st.DataObject, how: Codec, count: int
) -> None:
    good = codecs.encode(how, normal(count), np.random.default_rng(0)).tobytes()
    cut = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(ReplyError):
        codecs.decode(how, good[:cut], count)
    with pytest.raises(ReplyError):
        codecs.decode(how, good + b"\0", count)
    flipped = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=4)):
        flipped[bit // 8] ^= 1 << bit % 8
    only_replies_fail(how, bytes(flipped), count)


def smaller() -> tuple[Codec, bytes]:
    """Return a codec with entropy coding and a payload that it made smaller, of 4,096 values."""
    how = codec("int8", entropy_coding=True)
    payload = codecs.encode(how, np.zeros(4096, np.float32), np.random.default_rng(0)).tobytes()
    assert payload[0] == 1
    assert len(payload) < 200
    return how, payload


def test_zstandard_is_used_where_it_makes_the_payload_smaller() -> None:
    how, payload = smaller()
    assert not codecs.decode(how, payload, 4096).any()
    noise = np.frombuffer(np.random.default_rng(0).bytes(400), np.uint8).astype(np.float32)
    assert codecs.encode(codec("int8", 16, True), noise[:16], np.random.default_rng(0))[0] == 0


def test_a_compressed_payload_is_refused_where_none_was_agreed() -> None:
    how, payload = smaller()
    with pytest.raises(ReplyError, match="begin with the byte 0"):
        codecs.decode(dataclasses.replace(how, entropy_coding=False), payload, 4096)


def test_a_frame_that_declares_another_length_is_refused_before_it_is_opened() -> None:
    how, payload = smaller()
    bomb = b"\1" + zstandard.compress(bytes(2**24))
    with pytest.raises(ReplyError, match=f"declares {2**24} bytes, expected 4164"):
        codecs.decode(how, bomb, 4096)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4164))
    with pytest.raises(ReplyError, match="declares"):
        codecs.decode(how, b"\1" + silent, 4096)
    with pytest.raises(ReplyError, match="zstandard"):
        codecs.decode(how, payload + b"\0", 4096)
    with pytest.raises(ReplyError, match="no smaller than the plain 4164"):
        codecs.decode(how, b"\1" + bytes(4164), 4096)


def test_hostile_scales_values_and_positions_are_refused() -> None:
    """The largest scale follows the byte of kind; topk's bitmap too."""
    for scale in (np.nan, np.inf, -1.0):
        payload = codecs.encode(codec("int8"), normal(100), np.random.default_rng(0))
        payload[1:5] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
        with pytest.raises(ReplyError, match="int8: the largest scale"):
            codecs.decode(codec("int8"), payload, 100)
    for name, infinity in (("none", np.float32(np.inf).tobytes()), ("bf16", b"\x80\x7f")):
        payload = codecs.encode(codec(name), normal(100), np.random.default_rng(0))
        payload[1 : 1 + len(infinity)] = np.frombuffer(infinity, np.uint8)
        with pytest.raises(ReplyError, match=f"{name}: 1 of 100 numbers"):
            codecs.decode(codec(name), payload, 100)
    payload = codecs.encode(codec("topk"), normal(1000), np.random.default_rng(0))
    none_set, equal = payload.copy(), payload.copy()
    none_set[1:15] = 0
    with pytest.raises(ReplyError, match="topk: got 0 positions, expected 50"):
        codecs.decode(codec("topk"), none_set, 1000)
    equal[1:15] = [255] * 6 + [192] + [0] * 7  # all 50 high parts are 0, and so are the low parts
    equal[15:43] = 0
    with pytest.raises(ReplyError, match="must be ascending"):
        codecs.decode(codec("topk"), equal, 1000)


@pytest.mark.parametrize("kind", [bytes, memoryview, np.asarray])
def test_bytes_memoryviews_and_arrays_are_decoded_alike(kind: type) -> None:
    payload = codecs.encode(codec("int4"), normal(100), np.random.default_rng(0))
    expected = codecs.decode(codec("int4"), payload, 100)
    assert np.array_equal(codecs.decode(codec("int4"), kind(payload), 100), expected)
