"""Keys of an attempt, against the published test vectors."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from grandrounds.errors import ReplyError
from grandrounds.wire.masks import keys
from grandrounds.wire.masks.agreement import Agreement
from grandrounds.wire.masks.attempt import SIGNATURE_BYTES
from grandrounds.wire.masks.packed import SignedKeys
from grandrounds.wire.masks.prg import CHUNK_BYTES, Stream, add_mask
from tests.masking import RECEIVED, attempt_at, identity

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
BOB_PUBLIC = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")


def test_x25519_agrees_as_in_section_6_1_of_rfc_7748() -> None:
    assert keys.public_of(ALICE).hex() == ALICE_PUBLIC
    assert keys.public_of(BOB).hex() == BOB_PUBLIC
    for secret, public in ((ALICE, BOB_PUBLIC), (BOB, ALICE_PUBLIC)):
        assert keys.agreed(secret, bytes.fromhex(public), b"x") == keys.derived(SHARED, b"x")


@pytest.mark.parametrize(
    ("info", "salt", "expected"),
    [
        (
            "f0f1f2f3f4f5f6f7f8f9",
            "000102030405060708090a0b0c",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            "",
            "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_derives_as_in_cases_1_and_3_of_rfc_5869(info: str, salt: str, expected: str) -> None:
    found = keys.derived(b"\x0b" * 22, bytes.fromhex(info), bytes.fromhex(salt) or None, length=42)
    assert found.hex() == expected


def test_chacha20_has_the_key_stream_of_appendix_a_1_of_rfc_8439() -> None:
    stream = np.zeros(32, dtype="<u4")
    Stream(bytes(32)).fill(stream)
    assert stream.tobytes().hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_boxes_are_those_of_section_2_8_2_of_rfc_8439() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    key, bound = bytes(range(0x80, 0xA0)), bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    nonce = bytes.fromhex("070000004041424344454647")
    sealed = ChaCha20Poly1305(key).encrypt(nonce, text, bound)
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    assert keys.seal(key, text, bound) == ChaCha20Poly1305(key).encrypt(bytes(12), text, bound)


def test_a_box_opens_only_with_its_key_its_bytes_and_what_it_is_bound_to() -> None:
    box = keys.seal(bytes(32), b"content", b"bound")
    assert keys.unseal(bytes(32), box, b"bound") == b"content"
    assert keys.unseal(b"\1" * 32, box, b"bound") is None
    assert keys.unseal(bytes(32), box, b"other") is None
    assert keys.unseal(bytes(32), bytes([box[0] ^ 1]) + box[1:], b"bound") is None


@pytest.mark.parametrize(
    "public",
    [
        bytes(32),
        (1).to_bytes(32, "little"),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    ],
)
def test_no_key_is_agreed_with_a_point_of_low_order(public: bytes) -> None:
    with pytest.raises(ReplyError, match="low order"):
        keys.agreed(ALICE, public, b"")


def test_mask_seed_has_256_bits() -> None:
    """Each byte of a secret takes both values of each bit, and secrets, unlike 28 bits, differ."""
    drawn = np.frombuffer(b"".join(keys.new_secret() for _ in range(200)), np.uint8).reshape(-1, 32)
    bits = np.unpackbits(drawn, axis=1)
    assert bits.shape == (200, 256)
    assert ((bits.sum(axis=0) > 50) & (bits.sum(axis=0) < 150)).all()
    # every one of the 32 bytes of the shared secret changes the mask
    masks = {keys.derived(SHARED[:i] + b"\0" + SHARED[i + 1 :], b"") for i in range(32)}
    assert len(masks | {keys.derived(SHARED, b"")}) == 33


def test_signatures_have_one_length_and_bind_text_and_signer() -> None:
    text = attempt_at(3).bind("survivors", [0, 1, 2])
    signature = keys.sign(identity(0), text)
    assert len(signature) == SIGNATURE_BYTES
    assert keys.is_signed(identity(0).public_key(), text, signature)
    assert not keys.is_signed(identity(1).public_key(), text, signature)
    assert not keys.is_signed(identity(0).public_key(), text + b"\0", signature)
    for wrong in (b"", bytes(96), b"\xff" * 96, signature[:-1], signature[::-1]):
        assert not keys.is_signed(identity(0).public_key(), text, wrong)


def test_texts_of_other_purposes_attempts_and_parts_differ() -> None:
    base = attempt_at(3)
    attempts = [
        base,
        attempt_at(4),
        attempt_at(3, run="abc"),
        attempt_at(3, round_number=2),
        attempt_at(3, number=1),
    ]
    parts: list[tuple[bytes | int | list[int], ...]] = [
        *((), (b"",), (b"", b""), (0,), ([],), ([0],), ([0, 1],), ([0], [1]), (b"\0" * 8,)),
        *((b"a", b"b"), (b"ab",), (b"", b"ab")),
    ]
    texts = [
        one.bind(purpose, *part)
        for one in attempts
        for purpose in ("box", "own mask")
        for part in parts
    ]
    assert len(set(texts)) == len(texts)


def test_both_sites_of_a_pair_draw_one_mask_and_each_direction_has_a_box_key() -> None:
    agreement = Agreement(attempt_at(3), b"list")
    alice, bob = (
        SignedKeys(keys.public_of(secret), keys.public_of(secret), b"") for secret in (ALICE, BOB)
    )
    mask = agreement.pair_mask(ALICE, bob, (1, 2), RECEIVED)
    assert mask == agreement.pair_mask(BOB, alice, (2, 1), RECEIVED)
    there = agreement.box_key(ALICE, bob, 1, 2)
    assert there == agreement.box_key(BOB, alice, 1, 2)
    back = agreement.box_key(ALICE, bob, 2, 1)
    others = (
        agreement.pair_mask(ALICE, bob, (1, 3), RECEIVED),
        agreement.pair_mask(ALICE, bob, (1, 2), bytes(32)),
        Agreement(attempt_at(3), b"lisT").pair_mask(ALICE, bob, (1, 2), RECEIVED),
        Agreement(attempt_at(3, number=1), b"list").pair_mask(ALICE, bob, (1, 2), RECEIVED),
    )
    assert len({mask, there, back, *others}) == 7


@pytest.mark.parametrize("kind", ["<u4", "<u2"])
@pytest.mark.parametrize("length", [1, 5, CHUNK_BYTES // 2 + 3])
def test_a_mask_is_added_and_subtracted_modulo_its_type(kind: str, length: int) -> None:
    before = np.random.default_rng(0).integers(0, 2**16, length).astype(kind)
    masked = before.copy()
    add_mask(masked, ALICE, 1)
    stream = np.empty(length, dtype=kind)
    Stream(ALICE).fill(stream)
    assert (masked == before + stream).all()
    add_mask(masked, ALICE, -1)
    assert (masked == before).all()
