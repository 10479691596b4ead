"""Signed files, exchanged between a site and its consortium during admission."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grandrounds.engines.deployment import keys
from grandrounds.errors import ConfigError
from grandrounds.storage import read_json


def signed_text(
    content: Mapping[str, Any], key: keys.PrivateKey, second: keys.PrivateKey | None = None
) -> str:
    """Return signed content as JSON; a second key confirms what the first one signed."""
    whole = {"content": content, "signature": keys.sign(key, _canonical(content))}
    if second is not None:
        whole["second-signature"] = keys.sign(second, _canonical(content))
    return json.dumps(whole, indent=2) + "\n"


def write_signed(
    path: Path,
    content: Mapping[str, Any],
    key: keys.PrivateKey,
    second: keys.PrivateKey | None = None,
) -> None:
    """Write signed content to a new file; raise `ConfigError` if the file exists."""
    keys.write_new(path, signed_text(content, key, second).encode())


def check_second(path: Path, signer: keys.PublicKey) -> None:
    """Raise `ConfigError` unless the content of a signed file has a second signature of a key."""
    whole = read_json(path)
    signature = str(whole.get("second-signature", ""))
    if not keys.is_signed(signer, _canonical(whole["content"]), signature):
        raise ConfigError(
            f"{path} is not signed by {keys.fingerprint(signer)}, the key that it replaces."
        )


def read_signed(path: Path, what: str, key: keys.PublicKey | None) -> dict[str, Any]:
    """Return the content of a signed file.

    Parameters
    ----------
    what : str
        Expected kind of file, for the error message.
    key
        Key that must have signed it; None: the public key in its content.

    Raises
    ------
    ConfigError
        If the file is of another kind, or the signature is not valid.
    """
    whole = read_json(path)
    content, signature = whole.get("content"), whole.get("signature")
    if not isinstance(content, dict) or not isinstance(signature, str):
        raise ConfigError(f"{path} is not a grandrounds {what}.")
    signer = key or keys.read_public_text(str(content.get("public-key", "")))
    if not keys.is_signed(signer, _canonical(content), signature):
        raise ConfigError(
            f"{path} is not signed by {keys.fingerprint(signer)}: it was changed in transit, or "
            "comes from someone else. Ask for it again."
        )
    return content


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
