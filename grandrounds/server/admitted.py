"""The name and Flower node of each admitted site, read from a consortium's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grandrounds.config.keys import FederationConfig
from grandrounds.errors import ConfigError
from grandrounds.storage import read_bytes, read_json

EXAMPLES = "examples"
"""Key of an admission: the site's number of training examples, if the consortium set it."""


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
    contents = _admissions(federation, "name").values()
    return {content["partition-id"]: content["name"] for content in contents}


def admitted_examples(federation: FederationConfig) -> dict[int, int]:
    """Return partition id → number of training examples in its admission, where it has one.

    Raises
    ------
    ConfigError
        If an admission is damaged.
    """
    found = _admissions(federation)
    for file, content in found.items():
        count = content.get(EXAMPLES, 1)
        if type(count) is not int or count < 1:
            raise ConfigError(
                f"{file}: {EXAMPLES} is {count!r}, not an integer of at least 1. Admit the site "
                "again with grandrounds consortium admit --examples."
            )
    return {c["partition-id"]: c[EXAMPLES] for c in found.values() if EXAMPLES in c}


def _admissions(federation: FederationConfig, *texts: str) -> dict[Path, dict[str, Any]]:
    """Return file → content of all admissions; empty for a run without a consortium."""
    if not federation.consortium:
        return {}
    files = sorted((Path(federation.consortium) / "admissions").glob("*.json"))
    return {file: admission_of(file, *texts) for file in files}


def admission_of(file: Path, *texts: str) -> dict[str, Any]:
    """Return the content of an admission of this consortium, its signature unverified.

    Parameters
    ----------
    texts
        Keys that are needed beside the partition id.

    Raises
    ------
    ConfigError
        If it is damaged.
    """
    content = read_json(file).get("content")
    if not isinstance(content, dict) or not (
        all(isinstance(content.get(key), str) for key in texts)
        and type(content.get("partition-id")) is int
    ):
        raise ConfigError(
            f"{file}: the admission is damaged, without {', '.join(['content', *texts])} or "
            "partition-id. Copy it again, or remove it and repeat grandrounds consortium admit."
        )
    return content


def consortium_of(folder: Path) -> dict[str, Any]:
    """Return what a consortium's folder says of it: name and server.

    Raises
    ------
    ConfigError
        If the folder is not a consortium's, or the file is damaged.
    """
    described = read_json(file := folder / "consortium.json")
    if not all(isinstance(described.get(key), str) for key in ("name", "superlink")):
        raise ConfigError(
            f"{file} is damaged: it must hold the name of the consortium, and superlink, the "
            "server as host:port."
        )
    return described


def registered_nodes(folder: Path) -> dict[int, int]:
    """Return partition id → node of the admitted sites whose key was registered here.

    Raises
    ------
    ConfigError
        If the folder is not a consortium's, or an admission or a node file is damaged.
    """
    read_json(folder / "consortium.json")
    return {admission_of(file)["partition-id"]: node for file, node in nodes(folder).items()}


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
