"""Keys and certificates: what Flower and TLS accept, and what they do not."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from grandrounds.engines.deployment import keys
from grandrounds.errors import ConfigError


def test_a_private_key_is_its_owners_alone_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    keys.write_private_key(path, keys.new_key(), openssh=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="already exists and is not overwritten"):
        keys.write_private_key(path, keys.new_key())
    assert path.read_bytes() == before


@pytest.mark.parametrize("openssh", [True, False])
def test_a_key_is_read_as_it_was_written(tmp_path: Path, openssh: bool) -> None:
    key = keys.new_key()
    keys.write_private_key(tmp_path / "a.key", key, openssh=openssh)
    read = keys.read_private_key(tmp_path / "a.key")
    assert read.private_numbers() == key.private_numbers()


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    keys.write_private_key(path, keys.new_key())
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"is readable by other users \(mode 644\).* chmod 600"):
        keys.read_private_key(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name, key in (("ed", ed25519.Ed25519PrivateKey.generate()),
                      ("p256", ec.generate_private_key(ec.SECP256R1()))):  # fmt: skip
        text = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        keys.write_new(tmp_path / name, text, mode=0o600)
        with pytest.raises(ConfigError, match="not an ECDSA key on P-384"):
            keys.read_private_key(tmp_path / name)
    keys.write_new(tmp_path / "text", b"hello", mode=0o600)
    with pytest.raises(ConfigError, match="not a private key without passphrase"):
        keys.read_private_key(tmp_path / "text")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    key = keys.new_key().public_key()
    (tmp_path / "a.pub").write_text(keys.public_text(key, "a site") + "\n")
    told = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "a.pub")], capture_output=True, text=True
    )
    assert keys.fingerprint(key) in told.stdout


def test_a_signature_holds_for_its_content_and_key_alone() -> None:
    key, other = keys.new_key(), keys.new_key()
    signature = keys.sign(key, b"site 3")
    assert keys.is_signed(key.public_key(), b"site 3", signature)
    assert not keys.is_signed(key.public_key(), b"site 4", signature)
    assert not keys.is_signed(other.public_key(), b"site 3", signature)
    assert not keys.is_signed(key.public_key(), b"site 3", "no base 64 %")


def test_days_left_are_negative_when_a_certificate_has_expired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca_key = keys.new_key()
    ca = keys.new_authority("ca", ca_key)
    key = keys.new_key().public_key()
    fresh = keys.new_certificate("a", ["127.0.0.1", "a.example"], key, ca, ca_key)
    assert keys.days_left(fresh) == pytest.approx(keys.CERTIFICATE_DAYS, abs=0.1)
    monkeypatch.setattr(keys, "CERTIFICATE_DAYS", 0)
    old = keys.new_certificate("a", ["a.example"], key, ca, ca_key)
    assert keys.days_left(old) <= 0


@pytest.mark.parametrize("text", ["", "ssh-rsa AAAA", "hello world"])
def test_what_is_no_public_key_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a public key"):
        keys.read_public_text(text)


def test_what_is_no_certificate_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    with pytest.raises(ConfigError, match="holds no certificate"):
        keys.read_certificate(tmp_path / "ca.crt")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        keys.read_certificate(tmp_path / "none.crt")
