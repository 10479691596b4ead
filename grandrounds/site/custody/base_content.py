"""One SHA-256 over all files of a base model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from grandrounds.errors import ModelError

FileVersion = tuple[str, int, int]
"""Path, bytes and modification time in ns of a file."""


class Known(Protocol):
    """A cache of the SHA-256 of files."""

    def get(self, key: FileVersion) -> str | None:
        """Return the SHA-256 of a file; None if it is not known."""

    def __setitem__(self, key: FileVersion, value: str) -> None:
        """Add the SHA-256 of a file."""


def content_sha256(folder: Path, known: Known) -> str:
    """Return the SHA-256 over the sorted names and hashes of a base's files.

    Hidden files and Markdown are skipped: they do not affect what the model computes.

    Parameters
    ----------
    known
        Cache of known hashes; new ones are added.

    Raises
    ------
    ModelError
        If the folder or its config.json is missing, or a file cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a base model: it has no config.json.")
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
    if found := known.get(key):
        return found
    with file.open("rb") as handle:
        known[key] = found = hashlib.file_digest(handle, "sha256").hexdigest()
    return found
