"""What a base model's files hold: one SHA-256 over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from pathlib import Path

from grandrounds.errors import ModelError

BLOCK_BYTES = 1 << 22

Known = MutableMapping[tuple[str, int, int], str]
"""(path, bytes, modification time in ns) of a file → its SHA-256, so that none is read twice."""


def content_sha256(folder: Path, known: Known) -> str:
    """Return the SHA-256 of a base: of the sorted names and SHA-256 of all its files.

    Hidden files and Markdown are left out: they change nothing that a model computes.

    Parameters
    ----------
    known
        Hashes found before; new ones are added.

    Raises
    ------
    ModelError
        If the folder is not there, holds no config.json, or a file cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no base model: there is no config.json in it.")
    whole = hashlib.sha256()
    try:
        files = sorted(f for f in folder.rglob("*") if f.is_file() and _counts(f, folder))
        for file in files:
            name = file.relative_to(folder).as_posix()
            whole.update(f"{name}\0{_file_sha256(file, known)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"The base in {folder} cannot be read: {error.strerror} ({error.filename}). "
            "Check the permissions of the agent's user."
        ) from error
    return whole.hexdigest()


def _counts(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return not any(part.startswith(".") for part in parts) and file.suffix.lower() != ".md"


def _file_sha256(file: Path, known: Known) -> str:
    status = file.stat()
    key = (str(file), status.st_size, status.st_mtime_ns)
    if key not in known:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while block := handle.read(BLOCK_BYTES):
                digest.update(block)
        known[key] = digest.hexdigest()
    return known[key]
