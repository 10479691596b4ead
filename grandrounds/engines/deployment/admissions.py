"""Admission of a site: its signed request, its signed admission, and its node id.

consortium admit  request, signed by the node key → admission, signed by the authority
site join         admission → certificate authority, partition id in site.toml, systemd units
"""

from __future__ import annotations

import re
from pathlib import Path

from grandrounds import storage
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.set_up import check_name, with_value, write_units
from grandrounds.errors import ConfigError
from grandrounds.server.admitted import node_file
from grandrounds.site.custody.site_file import SiteFile, read_site_file

SERVER = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}")


def admit(folder: Path, request: Path, partition_id: int, num_partitions: int) -> Path:
    """Check a site's request and write its admission; return the admission's file.

    The site's public key is written beside it, for Flower. A site may be admitted again with
    another partition id, for example when the consortium has grown.

    Raises
    ------
    ConfigError
        If the request is damaged or not signed by the key in it, the partition id is out of range,
        or another site has the same partition id or name.
    """
    name, key = read_request(request)
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"--partition-id {partition_id} must be from 0 to {num_partitions - 1}, below "
            f"--num-partitions {num_partitions}."
        )
    consortium = storage.read_json(folder / "consortium.json")
    target = folder / "admissions" / f"{name}.json"
    content = {
        "consortium": consortium["name"],
        "name": name,
        "partition-id": partition_id,
        "num-partitions": num_partitions,
        "superlink": consortium["superlink"],
        "ca": (folder / "ca.crt").read_text(),
        "node": keys.fingerprint(key),
    }
    for file in sorted((folder / "admissions").glob("*.json")):
        other = storage.read_json(file)["content"]
        if (other["name"], other["node"]) == (name, content["node"]):
            continue
        if other["partition-id"] == partition_id or other["name"] == name:
            raise ConfigError(
                f"Site {other['name']!r} is already admitted with partition-id "
                f"{other['partition-id']} ({file}). Use another --partition-id, or remove that "
                "admission first."
            )
    authority = keys.read_private_key(folder / "authority.key")
    public = target.with_suffix(".pub")
    line = f"{keys.public_text(key, name)}\n"
    if not public.is_file() or public.read_text() != line:
        node_file(target).unlink(missing_ok=True)  # belongs to another key
    public.write_text(line)
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)  # left by an interrupted admission
    signed.write_signed(fresh, content, authority)
    fresh.replace(target)  # a run may be reading it
    return target


def read_request(request: Path) -> tuple[str, keys.PublicKey]:
    """Return name and node key of a site's request.

    Raises
    ------
    ConfigError
        If it is damaged, or not signed by the key in it.
    """
    described = signed.read_signed(request, "request", None)
    key = keys.read_public_text(str(described.get("public-key", "")))
    return check_name(str(described.get("name", ""))), key


def note_node(admission: Path, node: int) -> None:
    """Record the node id of a site's key, so that no other node can be that site."""
    storage.write_text(node_file(admission), f"{node}\n")  # a run may be reading it


def join(site: SiteFile, admission: Path, authority: Path) -> tuple[str, SiteFile]:
    """Apply an admission: certificate authority, server address and partition id.

    Return the name of the consortium, and the site's new site.toml.

    Parameters
    ----------
    authority : Path
        The consortium's `authority.pub`, received over another channel than the admission, or with
        its fingerprint compared.

    Raises
    ------
    ConfigError
        If the admission is not signed by the authority, or is for another node key.
    """
    trusted = keys.read_public_text(storage.read_bytes(authority).decode(errors="replace"))
    content = signed.read_signed(admission, "admission", trusted)
    own = keys.fingerprint(keys.read_private_key(site.place(site.node.private_key)).public_key())
    if content.get("node") != own:
        raise ConfigError(
            f"{admission} admits node key {content.get('node')}, but this site's is {own}. "
            "Ask for an admission of this site's request.json."
        )
    if not SERVER.fullmatch(str(content.get("superlink"))):
        raise ConfigError(f"{admission} does not name the server as host:port.")
    text = site.path.read_text(encoding="utf-8")
    for key in ("partition-id", "num-partitions", "superlink"):
        text = with_value(text, "node", key, content[key])
    consortium, certificate = content["consortium"], content["ca"]  # all read before any is written
    authority_file = site.place(site.node.root_certificates)
    authority_file.write_text(certificate)
    authority_file.chmod(0o644)  # readable by the SuperNode's user, whatever the umask
    site.path.write_text(text, encoding="utf-8")
    joined = read_site_file(site.path)
    write_units(joined)
    return consortium, joined
