"""How a site is admitted: its signed request, its signed admission, and the node that it is.

consortium admit  a request, signed by its node key → an admission, signed by the authority
site join         an admission → the certificate authority, the numbers in site.toml, units
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from grandrounds import storage
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.set_up import check_name, with_value, write_units
from grandrounds.errors import ConfigError
from grandrounds.server.admitted import node_file
from grandrounds.site.custody.site_file import SiteFile, read_site_file

SERVER = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}:[0-9]{1,5}")


@dataclass(frozen=True)
class Admission:
    """A consortium's word to one site."""

    consortium: str
    name: str
    partition_id: int
    num_partitions: int
    superlink: str
    """host:port that the site connects to."""
    ca: str
    """The certificate authority's certificate, in PEM."""
    node: str
    """Fingerprint of the site's node key."""


def admit(folder: Path, request: Path, partition_id: int, num_partitions: int) -> Path:
    """Check a site's request and write its admission; return the admission's file.

    The site's public key is written beside it, for Flower. A site may be admitted again: with other
    numbers when the consortium has grown.

    Raises
    ------
    ConfigError
        If the request is damaged or not signed by the key in it, the numbers cannot be, or another
        site has the number or the name.
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
                f"Site {other['name']!r} is admitted already, with partition-id "
                f"{other['partition-id']} ({file}). Give another --partition-id, or remove that "
                "admission first."
            )
    authority = keys.read_private_key(folder / "authority.key")
    public = target.with_suffix(".pub")
    line = f"{keys.public_text(key, name)}\n"
    if not public.is_file() or public.read_text() != line:
        node_file(target).unlink(missing_ok=True)  # of another key
    public.write_text(line)
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)  # of an admission that was interrupted
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
    """Write down which node a site's key was registered as, so that no other can be that site."""
    fresh = admission.with_suffix(".new")
    fresh.write_text(f"{node}\n")
    fresh.replace(node_file(admission))  # a run may be reading it


def join(site: SiteFile, admission: Path, authority: Path) -> Admission:
    """Take over an admission: the server's authority and address, and the site's number.

    Parameters
    ----------
    authority : Path
        `authority.pub` of the consortium, which came another way than the admission, or whose
        fingerprint was compared.

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
            f"{admission} admits the node key {content.get('node')}, and this site's is {own}. "
            "Ask for an admission of this site's request.json."
        )
    if not SERVER.fullmatch(str(content.get("superlink"))):
        raise ConfigError(f"{admission} names no server as host:port.")
    names = ("consortium", "name", "partition-id", "num-partitions", "superlink", "ca", "node")
    found = Admission(*(content[name] for name in names))
    authority_file = site.place(site.node.root_certificates)
    authority_file.write_text(found.ca)
    authority_file.chmod(0o644)  # the SuperNode's user reads it, whatever the umask
    text = site.path.read_text(encoding="utf-8")
    for key, value in (
        ("partition-id", found.partition_id),
        ("num-partitions", found.num_partitions),
        ("superlink", found.superlink),
    ):
        text = with_value(text, "node", key, value)
    site.path.write_text(text, encoding="utf-8")
    write_units(read_site_file(site.path))
    return found
