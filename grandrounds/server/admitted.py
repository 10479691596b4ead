"""Which of Flower's nodes each admitted site is, read from a consortium's folder."""

from __future__ import annotations

from pathlib import Path

from grandrounds.config.keys import FederationConfig
from grandrounds.errors import ConfigError
from grandrounds.storage import read_bytes, read_json


def admitted_nodes(federation: FederationConfig) -> dict[int, int]:
    """Return partition id → the node that the site was admitted as, where it is known."""
    return registered_nodes(Path(federation.consortium)) if federation.consortium else {}


def registered_nodes(folder: Path) -> dict[int, int]:
    """Return the numbers of the admitted sites and their nodes, where the key was registered here.

    Raises
    ------
    ConfigError
        If the folder is no consortium's, or an admission or the note of a node is damaged.
    """
    read_json(folder / "consortium.json")
    numbers = ((read_json(file)["content"], node) for file, node in nodes(folder).items())
    return {int(content["partition-id"]): node for content, node in numbers}


def nodes(folder: Path) -> dict[Path, int]:
    """Return the admissions of a consortium whose node is written down, and the node."""
    found: dict[Path, int] = {}
    for admission in sorted((folder / "admissions").glob("*.json")):
        file = node_file(admission)
        if not file.is_file():
            continue
        text = read_bytes(file).decode(errors="replace").strip()
        if not text.isdecimal():
            raise ConfigError(
                f"{file} holds {text[:40]!r}, not the number of a node: write its node-id "
                "(flwr supernode list), or remove the file."
            )
        found[admission] = int(text)
    return found


def node_file(admission: Path) -> Path:
    """Return the file beside an admission that says which node its key was registered as."""
    return admission.with_suffix(".node")
