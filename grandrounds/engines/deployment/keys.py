"""Keys and certificates of a consortium: who may connect, and to whom.

    certificate authority   signs the server's certificate; every site holds its certificate
    node key                a site's own (ECDSA, P-384); Flower's server holds the public key
    authority for nodes     signs a site's admission: its name, partition id and node key

Private keys are readable by their owner only (mode 0600), and never overwritten.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from grandrounds.errors import ConfigError
from grandrounds.storage import read_bytes
from grandrounds.wire.masks.keys import read_private_key as read_private_key

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 825


def new_key() -> PrivateKey:
    """Return a new key on the curve that Flower's nodes use."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private_key(path: Path, key: PrivateKey, *, openssh: bool = False) -> None:
    """Write a private key, readable by its owner only.

    Raises
    ------
    ConfigError
        If the file exists or cannot be written.
    """
    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_new(path, text, mode=0o600)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a new file; raise `ConfigError` if it exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} already exists and is not overwritten. Choose another folder, or remove it "
            "if it is no longer needed."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def public_text(key: PublicKey, comment: str = "") -> str:
    """Return a public key in OpenSSH format."""
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{text.decode()} {comment}".rstrip()


def read_public_text(text: str) -> PublicKey:
    """Return a public key in OpenSSH format; raise `ConfigError` if it is not one."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{text[:60]!r} is not a public key in OpenSSH format.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{text[:60]!r} is not an ECDSA key.")
    return key


def fingerprint(key: PublicKey) -> str:
    """Return a key's fingerprint, as `ssh-keygen -l` prints it."""
    blob = base64.b64decode(public_text(key).split()[1])
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f"SHA256:{digest}"


def sign(key: PrivateKey, content: bytes) -> str:
    """Return an ECDSA signature over SHA-384, in Base64."""
    return base64.b64encode(key.sign(content, ec.ECDSA(hashes.SHA384()))).decode()


def is_signed(key: PublicKey, content: bytes, signature: str) -> bool:
    """Whether the key signed the content."""
    try:
        key.verify(base64.b64decode(signature, validate=True), content, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


# --- Certificates ---------------------------------------------------------------------------------


def new_authority(name: str, key: PrivateKey) -> x509.Certificate:
    """Return the self-signed certificate of a certificate authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def new_certificate(
    name: str,
    hosts: Sequence[str],
    public_key: PublicKey,
    authority: x509.Certificate,
    authority_key: PrivateKey,
) -> x509.Certificate:
    """Return a certificate for host names or addresses, valid for servers and clients."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(subject, authority.subject, public_key, CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: PublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def certificate_text(certificate: x509.Certificate) -> bytes:
    """Return a certificate in PEM format."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(path: Path) -> x509.Certificate:
    """Return a certificate; raise `ConfigError` if the file holds none."""
    try:
        return x509.load_pem_x509_certificate(read_bytes(path))
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM format.") from error


def days_left(certificate: x509.Certificate) -> float:
    """Return the remaining validity of a certificate in days; negative if it has expired."""
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.total_seconds() / 86400
