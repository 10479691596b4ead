"""Keys of an attempt: agreement by X25519, HKDF-SHA256, sealed boxes, identities that sign.

RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305), all from `cryptography`.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from grandrounds.errors import ConfigError, ReplyError
from grandrounds.storage import read_bytes
from grandrounds.wire.masks.attempt import KEY_BYTES, SIGNATURE_BYTES

_NO_NONCE = bytes(12)

Identity = ec.EllipticCurvePrivateKey
"""A site's agent key."""

Secret = bytes | X25519PrivateKey
"""The secret of a key on Curve25519, or what `opened` makes of it."""

Public = ec.EllipticCurvePublicKey


def new_secret() -> bytes:
    """Return 256 random bits from the operating system."""
    return os.urandom(KEY_BYTES)


def opened(secret: bytes) -> X25519PrivateKey:
    """Return a secret as what agrees on keys: for many keys at once, this is half of the work."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_of(secret: bytes) -> bytes:
    """Return the public key on Curve25519 of a secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: Secret, public: bytes, info: bytes) -> bytes:
    """Return the key that two ends agree on for one purpose.

    Parameters
    ----------
    public : bytes
        The other end's public key, of 32 bytes.
    info : bytes
        What the key is bound to (`Attempt.bind`), the same at both ends.

    Raises
    ------
    ReplyError
        If the other end's key makes the agreed key zero, whatever the secret.
    """
    try:
        other = X25519PublicKey.from_public_bytes(public)
        own = opened(secret) if isinstance(secret, bytes) else secret
        shared = own.exchange(other)
    except ValueError as error:
        raise ReplyError(
            "a public key is of low order, and no key can be agreed with it"
        ) from error
    return derived(shared, info)


def derived(secret: bytes, info: bytes, salt: bytes | None = None, length: int = 32) -> bytes:
    """Return a key derived from a secret by HKDF-SHA256."""
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


def seal(key: bytes, content: bytes, bound: bytes) -> bytes:
    """Return a box with a content.

    Parameters
    ----------
    key : bytes
        Sealing one box only, since the nonce is always zero.
    bound : bytes
        What the box is authenticated with besides its content.
    """
    return ChaCha20Poly1305(key).encrypt(_NO_NONCE, content, bound)


def unseal(key: bytes, box: bytes, bound: bytes) -> bytes | None:
    """Return the content of a box; None if box, key or what it is bound to differs."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NO_NONCE, box, bound)
    except InvalidTag:
        return None


# --- Identities -----------------------------------------------------------------------------------


def sign(identity: Identity, text: bytes) -> bytes:
    """Return an ECDSA signature over SHA-384, of 96 bytes."""
    r, s = decode_dss_signature(identity.sign(text, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(SIGNATURE_BYTES // 2) + s.to_bytes(SIGNATURE_BYTES // 2)


def is_signed(public: Public, text: bytes, signature: bytes) -> bool:
    """Whether the holder of a public key signed a text."""
    half = SIGNATURE_BYTES // 2
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:half]), int.from_bytes(signature[half:])
    try:
        public.verify(encode_dss_signature(r, s), text, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def read_private_key(path: Path) -> Identity:
    """Return a private key in OpenSSH or PKCS #8 format.

    Raises
    ------
    ConfigError
        If other users can read it, it has a passphrase, or it is not an ECDSA key on P-384.
    """
    content = read_bytes(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path} is readable by other users (mode {path.stat().st_mode & 0o777:o}): whoever "
            f"holds it can act as this site. chmod 600 {path}"
        )
    try:
        key = (
            serialization.load_ssh_private_key(content, None)
            if b"OPENSSH" in content[:64]
            else serialization.load_pem_private_key(content, None)
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is not a private key without passphrase ({error}).") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{path} is not an ECDSA key on P-384, the curve of Flower's nodes. Create one with "
            "grandrounds site init."
        )
    return key


def read_public(text: str) -> Public | None:
    """Return the public key on P-384 of a text in OpenSSH format; None if it is none."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    return None


def public_bytes(key: Public) -> bytes:
    """Return a public key as an uncompressed point: 97 bytes."""
    return key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
