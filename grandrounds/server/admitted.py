"""The name and Flower node of each admitted site, read from a consortium's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grandrounds.config.keys import FederationConfig
from grandrounds.errors import ConfigError
from grandrounds.storage import read_bytes, read_json


def admitted_nodes(federation: FederationConfig) -> dict[int, int]:
    """Return partition id → node of the admitted sites, where the node is known."""
    return registered_nodes(Path(federation.consortium)) if federation.consortium else {}


def admitted_names(federation: FederationConfig) -> dict[int, str]:
    """Return partition id → name of the admitted sites, whether their node is known or not.

    Raises
    ------
    ConfigError
        If an admission is damaged.
    """
    if not federation.consortium:
        return {}
    files = sorted((Path(federation.consortium) / "admissions").glob("*.json"))
    try:
        contents = [read_json(file)["content"] for file in files]
        return {int(content["partition-id"]): str(content["name"]) for content in contents}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{federation.consortium}: an admission is damaged, without content, partition-id or "
            "name. Copy it again, or repeat grandrounds consortium admit."
        ) from error


def registered_nodes(folder: Path) -> dict[int, int]:
    """Return partition id → node of the admitted sites whose key was registered here.

    Raises
    ------
    ConfigError
        If the folder is not a consortium's, or an admission or a node file is damaged.
    """
    read_json(folder / "consortium.json")
    numbers = ((read_json(file)["content"], node) for file, node in nodes(folder).items())
    return {int(content["partition-id"]): node for content, node in numbers}


def nodes(folder: Path) -> dict[Path, int]:
    """Return admission file → node, for the admissions that have a node file."""
    found: dict[Path, int] = {}
    for admission in sorted((folder / "admissions").glob("*.json")):
        file = node_file(admission)
        if not file.is_file():
            continue
        text = read_bytes(file).decode(errors="replace").strip()
        if not text.isdecimal():
            raise ConfigError(
                f"{file} holds {text[:40]!r}, which is not a node id: write the node's id "
                "(flwr supernode list), or remove the file."
            )
        found[admission] = int(text)
    return found


REVOKED = "revoked.json"
"""File of a consortium: the keys that it has revoked, signed by its authority."""


def revocations(folder: Path) -> list[dict[str, Any]]:
    """Return the revoked keys of a consortium: name, node (fingerprint), date, node-id if known.

    Raises
    ------
    ConfigError
        If the list is damaged.
    """
    file = folder / REVOKED
    if not file.is_file():
        return []
    content = read_json(file).get("content")
    entries = content.get("revoked") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and {"name", "node", "revoked"} <= entry.keys()
        and str(entry.get("node-id", "0")).isdecimal()
        for entry in entries
    ):
        raise ConfigError(f"{file} is damaged: copy it again from where it was signed.")
    return entries


def revoked_nodes(federation: FederationConfig) -> dict[int, str]:
    """Return node → reason why it is refused, for the nodes whose key was revoked."""
    found = revocations(Path(federation.consortium)) if federation.consortium else []
    reason = "the key of {name!r} was revoked at {revoked}"
    return {int(e["node-id"]): reason.format(**e) for e in found if "node-id" in e}


def node_file(admission: Path) -> Path:
    """Return the file beside an admission that holds the node of its registered key."""
    return admission.with_suffix(".node")
