"""Admission of a site by its consortium, and its revocation.

consortium admit   request, signed by the node key → admission, signed by the authority
consortium revoke  → a list of revoked keys, signed by the authority

Everything that the authority signs has a serial, which only grows.
"""

from __future__ import annotations

import datetime
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from grandrounds import storage
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.set_up import AGENT_KEY, check_name
from grandrounds.errors import ConfigError
from grandrounds.server.admitted import (
    EXAMPLES,
    REVOKED,
    admission_of,
    consortium_of,
    node_file,
    revocations,
)

VALID_DAYS = 30
"""How long an admission can be joined with, by default."""

SERIAL = "serial"
"""File of a consortium with the serial of what the authority signed last."""


@dataclass(frozen=True)
class Request:
    """A site's request to be admitted, with valid signatures."""

    name: str
    key: keys.PublicKey
    replaced: str
    """Fingerprint of the node key that the site replaces by this one; empty: none."""
    agent_key: str
    """Public key of its agent, in OpenSSH format; empty: an earlier version wrote the request."""


def admit(
    folder: Path,
    request: Path,
    partition_id: int,
    num_partitions: int,
    days: int = VALID_DAYS,
    examples: int = 0,
) -> Path:
    """Check a site's request and write its admission; return the admission's file.

    The site's public key is written beside it, for Flower. A site may be admitted again with
    another partition id, for example when the consortium has grown, and with another key, if the
    key that it had signed the request too.

    Parameters
    ----------
    days : int
        How long the site can join with it.
    examples : int
        The site's number of training examples, which its weight in a run does not exceed; 0: the
        one that it introduces itself with.

    Raises
    ------
    ConfigError
        If the request is damaged or not signed by the key in it, the partition id is out of range,
        another site has the same partition id or name, or the key was revoked.
    """
    asked = read_request(request)
    name, node = asked.name, keys.fingerprint(asked.key)
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"--partition-id {partition_id} must be from 0 to {num_partitions - 1}, below "
            f"--num-partitions {num_partitions}."
        )
    consortium = consortium_of(folder)
    if any(entry["node"] == node for entry in revocations(folder)):
        raise ConfigError(
            f"The node key {node} of {name!r} was revoked: the site must make another one "
            "(grandrounds site init in a new folder)."
        )
    target = folder / "admissions" / f"{name}.json"
    _check_free(folder, asked, partition_id)
    authority = keys.read_private_key(folder / "authority.key")
    content = {
        "consortium": consortium["name"],
        "name": name,
        "partition-id": partition_id,
        "num-partitions": num_partitions,
        "superlink": consortium["superlink"],
        "ca": storage.read_text(folder / "ca.crt"),
        "node": node,
        **({AGENT_KEY: asked.agent_key} if asked.agent_key else {}),
        **({EXAMPLES: examples} if examples else {}),
        "serial": next_serial(folder),
        "expires": timestamp(datetime.timedelta(days=days)),
    }
    public = target.with_suffix(".pub")
    line = f"{keys.public_text(asked.key, name)}\n"
    if not public.is_file() or storage.read_text(public) != line:
        _set_aside(target)
    storage.write_text(public, line)
    storage.write_text(target, signed.signed_text(content, authority))  # a run may be reading it
    return target


def _check_free(folder: Path, asked: Request, partition_id: int) -> None:
    """Raise `ConfigError` if another site has this partition id or name."""
    for file in sorted((folder / "admissions").glob("*.json")):
        other = admission_of(file, "name", "node")
        own = (keys.fingerprint(asked.key), asked.replaced)
        if other["name"] == asked.name and other["node"] in own:
            continue
        if other["partition-id"] == partition_id or other["name"] == asked.name:
            raise ConfigError(
                f"Site {other['name']!r} is already admitted with partition-id "
                f"{other['partition-id']} ({file}). Use another --partition-id, or revoke that "
                "site first (grandrounds consortium revoke)."
            )


def read_request(request: Path) -> Request:
    """Return a site's request.

    Raises
    ------
    ConfigError
        If it is damaged, not signed by the key in it, or not by the key that it replaces, or its
        agent key is none.
    """
    described = signed.read_signed(request, "request", None)
    key = keys.read_public_text(str(described.get("public-key", "")))
    replaced = ""
    if "replaces" in described:
        before = keys.read_public_text(str(described["replaces"]))
        signed.check_second(request, before)
        replaced = keys.fingerprint(before)
    agent_key = str(described.get(AGENT_KEY, ""))
    if agent_key:
        keys.read_public_text(agent_key)
    return Request(check_name(str(described.get("name", ""))), key, replaced, agent_key)


def note_node(admission: Path, node: int) -> None:
    """Record the node id of a site's key, so that no other node can be that site."""
    storage.write_text(node_file(admission), f"{node}\n")  # a run may be reading it


def _set_aside(admission: Path) -> None:
    """Move the node id of a site's present key to those that the site has replaced."""
    if (node := node_file(admission)).is_file():
        before = replaced_nodes(admission)
        lines = "".join(f"{number}\n" for number in [*before, storage.read_text(node).strip()])
        storage.write_text(replaced_node_file(admission), lines)
        node.unlink()


def replaced_nodes(admission: Path) -> list[int]:
    """Return the node ids of keys that a site has replaced and that are still registered."""
    file = replaced_node_file(admission)
    lines = storage.read_text(file).split() if file.is_file() else []
    if strange := [line for line in lines if not line.isdecimal()]:
        raise ConfigError(
            f"{file} holds {strange[0][:40]!r}, which is not a node id: write the ids of the nodes "
            "that the site was before (flwr supernode list), or remove the file."
        )
    return list(map(int, lines))


def replaced_node_file(admission: Path) -> Path:
    """Return the file with the node ids of the keys that a site has replaced."""
    return admission.with_suffix(".replaced-node")


def revoke(folder: Path, name: str) -> Path:
    """Revoke a site's key: list it, and take its admission away; return the moved admission.

    Raises
    ------
    ConfigError
        If no site of that name is admitted.
    """
    admission = folder / "admissions" / f"{check_name(name)}.json"
    if not admission.is_file():
        known = sorted(file.stem for file in admission.parent.glob("*.json"))
        raise ConfigError(
            f"No site {name!r} is admitted in {folder}. Admitted: {', '.join(known) or 'none'}."
        )
    authority = keys.read_private_key(folder / "authority.key")
    content, serial = admission_of(admission, "consortium", "node"), next_serial(folder)
    entry = {"name": name, "node": content["node"], "revoked": timestamp()}
    if (node := node_file(admission)).is_file():
        entry["node-id"] = storage.read_text(node).strip()
    listed = {
        "consortium": content["consortium"],
        "serial": serial,
        "revoked": [*revocations(folder), entry],
    }
    storage.write_text(folder / REVOKED, signed.signed_text(listed, authority))
    past = admission.parent / "revoked"
    past.mkdir(exist_ok=True)
    moved = past / f"{name}-{serial}.json"
    for file in admission.parent.glob(f"{name}.*"):
        if file.stem == name:
            file.replace(moved.with_suffix(file.suffix))
    return moved


def check_revocations(folder: Path) -> None:
    """Raise `ConfigError` if a consortium's list of revoked keys is not signed by its authority."""
    if (folder / REVOKED).is_file():
        authority = keys.read_public_text(storage.read_text(folder / "authority.pub"))
        signed.read_signed(folder / REVOKED, "list of revoked keys", authority)


def timestamp(later: datetime.timedelta = datetime.timedelta()) -> str:
    """Return the time now, or some time later, in UTC."""
    return (datetime.datetime.now(datetime.UTC) + later).strftime("%Y-%m-%dT%H:%M:%SZ")


def next_serial(folder: Path) -> int:
    """Return the next serial of a consortium, and record it."""
    file = folder / SERIAL
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        text = storage.read_text(file).strip() if file.is_file() else "0"
        if not text.isdecimal():
            raise ConfigError(
                f"{file} holds {text[:40]!r}, which is no serial: write the highest serial of the "
                "files in admissions."
            )
        storage.write_text(file, f"{int(text) + 1}\n")
    finally:
        os.close(handle)  # and with it the lock
    return int(text) + 1
