"""Replaces several files of a site, all or none: an interruption leaves the old or the new ones.

The new content of all files is written to one file first, and removed when each is in its place.
If the process ends in between, whoever reads the site's file next puts the rest in place.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from grandrounds import storage
from grandrounds.errors import ConfigError

PENDING = ".pending.json"


def replace_together(folder: Path, texts: Mapping[Path, str | None]) -> None:
    """Replace files of a site by these texts.

    A file keeps its owner and its mode; a new one belongs to the folder's owner, with mode 0644.

    Parameters
    ----------
    folder : Path
        Folder of the site's file.
    texts
        File → its text; None removes it.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    finish(folder)
    with _writing(folder):
        pending = {str(path): text for path, text in texts.items()}
        _put(folder / PENDING, json.dumps(pending), 0o600)
    finish(folder)


def finish(folder: Path) -> None:
    """Put files in their places that an interrupted `replace_together` has left.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    file = folder / PENDING
    if not file.exists():
        return
    with _writing(folder), file.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            return  # another process was faster
        for name, text in storage.read_json(file).items():
            if text is None:
                Path(name).unlink(missing_ok=True)
            else:
                _put(Path(name), str(text), 0o644)
        file.unlink(missing_ok=True)


def _writing(folder: Path) -> AbstractContextManager[None]:
    return storage.writing(
        f"The site in {folder}",
        "Run grandrounds site check as root: it puts the rest of an interrupted change in place.",
        ConfigError,
    )


def _put(path: Path, text: str, mode: int) -> None:
    """Write a file under another name, flush it and rename it."""
    is_new = not path.exists()
    before = (path.parent if is_new else path).stat()
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as opened:
        os.fchmod(handle, mode if is_new else before.st_mode & 0o777)
        if os.geteuid() == 0:
            os.fchown(handle, before.st_uid, before.st_gid)
        opened.write(text.encode())
        opened.flush()
        os.fsync(handle)
    partial.replace(path)
