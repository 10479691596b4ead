"""One SHA-256 over all files of a base model."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from grandrounds.errors import ModelError

REREAD_SECONDS = 24 * 3600.0
"""How long a hash is taken for a file's, if nothing about the file changes."""


@dataclass(frozen=True)
class FileVersion:
    """What of a file changes with its content.

    Size and modification time alone can be restored after a change; the time of the last change of
    the file's own record (ctime) is set by the kernel.
    """

    path: str
    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> FileVersion:
        """Return the current version of a file."""
        seen = file.stat()
        return cls(str(file), seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)


class KnownHashes:
    """The SHA-256 of files that this process has read in the last day.

    Nothing is kept on disk: a new process reads every file once.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[FileVersion, str, float]] = {}

    def get(self, version: FileVersion) -> str | None:
        """Return the SHA-256 of a file; None if it is to be read again."""
        version_then, sha256, read = self._found.get(version.path, (None, "", 0.0))
        is_recent = time.monotonic() - read < REREAD_SECONDS
        return sha256 if version_then == version and is_recent else None

    def add(self, version: FileVersion, sha256: str) -> None:
        """Keep the SHA-256 of a file."""
        self._found[version.path] = version, sha256, time.monotonic()


def content_sha256(folder: Path, known: KnownHashes) -> str:
    """Return the SHA-256 over the sorted names and hashes of a base's files.

    Hidden files and Markdown are skipped: they do not affect what the model computes.

    Parameters
    ----------
    known
        Hashes of files read before; new ones are added.

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


def _file_sha256(file: Path, known: KnownHashes) -> str:
    version = FileVersion.of(file)
    if found := known.get(version):
        return found
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if FileVersion.of(file) == version:  # else it was changed while it was read
        known.add(version, found)
    return found
