"""What a site does about its admission: join with it, and replace the node key.

site join        admission → certificate authority, partition id in site.toml, systemd units
site rotate-key  → a new node key, and a request signed by it and by the present one
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509

import grandrounds
from grandrounds import storage
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.set_up import (
    AGENT_KEY,
    IDENTITY,
    new_identity,
    units,
    with_value,
)
from grandrounds.errors import ConfigError
from grandrounds.server import admitted
from grandrounds.site.custody.site_file import SiteFile, parse_site_file, read_site_file
from grandrounds.site.custody.together import replace_together

SERVER = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}")

JOINED = "joined.json"
"""File of a site: fingerprint of an authority → serial of the last admission joined with."""

AUTHORITY = "authority.pub"
"""File of a site: public key of the authority that it joined with."""

NEXT_KEY, NEXT_REQUEST = "node.next.key", "request.next.json"
"""Files of a site: the node key that waits for its admission, and the request for it."""

NEXT_IDENTITY = "identity.next.key"
"""File of a site: the agent key that is put in place with that node key."""


def join(site: SiteFile, admission: Path, authority: Path) -> tuple[str, SiteFile]:
    """Apply an admission: certificate authority, server address, partition id and node key.

    Everything is checked before anything is written, and either all files are replaced or none.
    Return the name of the consortium, and the site's new site.toml.

    Parameters
    ----------
    authority : Path
        The consortium's `authority.pub`, received over another channel than the admission, or with
        its fingerprint compared.

    Raises
    ------
    ConfigError
        If the admission is not signed by the authority, has expired, is older than the one that
        the site has joined with, is for another node key, or is incomplete.
    """
    trusted = keys.read_public_text(storage.read_bytes(authority).decode(errors="replace"))
    content = signed.read_signed(admission, "admission", trusted)
    folder = site.path.parent
    joined = _joined(folder)
    signer = keys.fingerprint(trusted)
    _check_current(admission, content, joined.get(signer, 0))
    if content.get("node") in [entry["node"] for entry in revocations(folder)]:
        raise ConfigError(f"The node key that {admission} admits was revoked by the consortium.")
    _check_content(admission, content)
    texts: dict[Path, str | None] = {}
    if not _is_for(content, site.place(site.node.private_key)):
        if not _is_for(content, folder / NEXT_KEY):
            raise ConfigError(
                f"{admission} admits node key {content.get('node')}, but this site's is "
                f"{_fingerprint(site.place(site.node.private_key))}. Ask for an admission of this "
                "site's request.json."
            )
        texts |= _next_key(site)
    text = site.path.read_text(encoding="utf-8")
    for key in ("partition-id", "num-partitions", "superlink"):
        text = with_value(text, "node", key, content[key])
    after = parse_site_file(site.path, text)
    record = {**joined, signer: content["serial"]}
    texts |= {
        site.place(site.node.root_certificates): content["ca"],
        folder / AUTHORITY: f"{keys.public_text(trusted)}\n",
        folder / JOINED: f"{json.dumps(record, indent=2)}\n",
        site.path: text,
        **{folder / name: unit for name, unit in units(after).items()},
    }
    replace_together(folder, texts)
    return str(content["consortium"]), read_site_file(site.path)


def _joined(folder: Path) -> dict[str, int]:
    """Return the fingerprint of each authority → serial of the last admission joined with."""
    file = folder / JOINED
    if not file.is_file():
        return {}
    found = storage.read_json(file)
    if not all(isinstance(serial, int) for serial in found.values()):
        raise ConfigError(f"{file} is damaged: it must hold a serial for each authority.")
    return found


def _check_current(admission: Path, content: Mapping[str, Any], joined_serial: int) -> None:
    """Raise `ConfigError` if an admission has expired or was replaced by a later one."""
    serial, expires = content.get("serial"), _time(content.get("expires"))
    if not isinstance(serial, int) or isinstance(serial, bool) or expires is None:
        raise ConfigError(
            f"{admission} has no serial or no expiry: an earlier version of grandrounds wrote it. "
            "Ask the consortium to admit this site again."
        )
    if serial < joined_serial:
        raise ConfigError(
            f"{admission} has serial {serial}, but this site has joined with serial "
            f"{joined_serial}: it is an old admission. Ask the consortium for the latest."
        )
    if expires < datetime.datetime.now(datetime.UTC):
        raise ConfigError(
            f"{admission} expired at {content['expires']}: ask the consortium to admit this site "
            "again, or set this machine's clock if it is wrong."
        )


def _time(text: object) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo else None


def _check_content(admission: Path, content: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if something is missing from an admission, or cannot be."""
    if not SERVER.fullmatch(str(content.get("superlink"))):
        raise ConfigError(f"{admission} does not name the server as host:port.")
    numbers = [content.get(key) for key in ("partition-id", "num-partitions")]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ConfigError(f"{admission} does not number the site: {numbers}.")
    if not isinstance(content.get("consortium"), str):
        raise ConfigError(f"{admission} does not name the consortium.")
    try:
        certificate = x509.load_pem_x509_certificate(str(content.get("ca")).encode())
    except ValueError as error:
        raise ConfigError(f"{admission} contains no certificate authority.") from error
    if keys.days_left(certificate) < 0:
        raise ConfigError(f"{admission} contains a certificate authority that has expired.")


def _is_for(content: Mapping[str, Any], key: Path) -> bool:
    return key.is_file() and content.get("node") == _fingerprint(key)


def _fingerprint(key: Path) -> str:
    return keys.fingerprint(keys.read_private_key(key).public_key())


def revocations(folder: Path) -> list[dict[str, Any]]:
    """Return the consortium's revoked keys, if its list lies beside the site's file.

    Raises
    ------
    ConfigError
        If the list is not signed by the authority that the site has joined with.
    """
    if not (folder / admitted.REVOKED).is_file():
        return []
    if not (folder / AUTHORITY).is_file():
        raise ConfigError(
            f"{folder / AUTHORITY} is missing, which verifies {admitted.REVOKED}: join again."
        )
    authority = keys.read_public_text(storage.read_text(folder / AUTHORITY))
    signed.read_signed(folder / admitted.REVOKED, "list of revoked keys", authority)
    return admitted.revocations(folder)


def rotate_key(site: SiteFile, *, agent_key: bool = False) -> Path:
    """Write a new node key, and the request for its admission; return the request.

    The present key stays in use until the site joins with the new admission. A site that has no
    agent key yet gets one.

    Parameters
    ----------
    agent_key : bool
        Whether to replace the agent key too. A new roster must be accepted then.

    Raises
    ------
    ConfigError
        If a new key is waiting already, or the present one cannot be read.
    """
    folder = site.path.parent
    present = keys.read_private_key(site.place(site.node.private_key))
    if (folder / NEXT_KEY).exists() and (folder / NEXT_REQUEST).exists():
        raise ConfigError(
            f"{folder / NEXT_KEY} waits for its admission: send {folder / NEXT_REQUEST} to the "
            "consortium, or remove both to start again."
        )
    (folder / NEXT_KEY).unlink(missing_ok=True)  # its request was never written
    (folder / NEXT_IDENTITY).unlink(missing_ok=True)
    if not (folder / IDENTITY).exists():
        identity = new_identity(folder / IDENTITY)
        os.chown(folder / IDENTITY, folder.stat().st_uid, folder.stat().st_gid)
    elif agent_key:
        identity = new_identity(folder / NEXT_IDENTITY)
    else:
        identity = keys.read_private_key(folder / IDENTITY).public_key()
    key = keys.new_key()
    keys.write_private_key(folder / NEXT_KEY, key, openssh=True)
    content = {
        "name": site.name,
        "public-key": keys.public_text(key.public_key(), site.name),
        AGENT_KEY: keys.public_text(identity, site.name),
        "replaces": keys.public_text(present.public_key(), site.name),
        "version": grandrounds.__version__,
    }
    signed.write_signed(folder / NEXT_REQUEST, content, key, present)
    return folder / NEXT_REQUEST


def _next_key(site: SiteFile) -> dict[Path, str | None]:
    """Return the files that put the waiting node key in the place of the present one."""
    folder = site.path.parent
    key = keys.read_private_key(folder / NEXT_KEY)
    identity: dict[Path, str | None] = {}
    if (folder / NEXT_IDENTITY).exists():
        text = storage.read_text(folder / NEXT_IDENTITY)
        identity = {folder / IDENTITY: text, folder / NEXT_IDENTITY: None}
    return {
        **identity,
        site.place(site.node.private_key): storage.read_text(folder / NEXT_KEY),
        folder / "node.pub": f"{keys.public_text(key.public_key(), site.name)}\n",
        folder / "request.json": storage.read_text(folder / NEXT_REQUEST),
        folder / NEXT_REQUEST: None,
        folder / NEXT_KEY: None,
    }
