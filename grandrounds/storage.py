"""Files and folders, written atomically and durably, and read with clear errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grandrounds.errors import ConfigError, GrandRoundsError, first_line


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it and flush its folder.

    Raises
    ------
    OSError
        If the folder is missing or not writable, or the disk is full.
    """
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        _flush(partial)
        partial.replace(file)
        flush_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text as UTF-8, atomically like `write_bytes`."""
    write_bytes(file, text.encode())


def write_json(file: Path, data: Any) -> None:
    """Write JSON with an indent of two, atomically like `write_bytes`."""
    write_bytes(file, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """Return JSON with an indent of two, as `write_json` writes it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def append_text(file: Path, text: str) -> None:
    """Append a text as UTF-8 and flush it to disk."""
    is_new = not file.exists()
    with file.open("a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    if is_new:
        flush_folder(file.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with its content, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, *, replace: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` when it has been filled without an error.

    A `target` with content is replaced if `replace`, else it is an `OSError` and left as it is.
    Its files are as readable as `mode` and the umask allow the folder, whatever modes libraries
    wrote them with.
    """
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode)
        yield partial
        readable = partial.stat().st_mode & 0o666  # a new folder has what the umask leaves
        for file in partial.rglob("*"):
            if file.is_dir():
                flush_folder(file)
            else:
                file.chmod(readable)
                _flush(file)
        flush_folder(partial)
        if replace and (target.exists() or target.is_symlink()):
            remove(target)
        partial.rename(target)
        flush_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(
    place: str,
    advice: str | Callable[[], str],
    error_type: type[GrandRoundsError],
    failures: tuple[type[Exception], ...] = (OSError,),
) -> Iterator[None]:
    """Report a full disk or missing permission as one error that names the place.

    Parameters
    ----------
    place : str
        What is being written, as the beginning of a sentence.
    advice : str or function
        What to do about it, in full sentences; a function is called if writing fails.
    failures
        Exceptions that mean that writing failed.
    """
    try:
        yield
    except failures as error:
        told = advice if isinstance(advice, str) else advice()
        raise error_type(f"{place} cannot be written: {first_line(error)}. {told}") from error


def found(name: str) -> Path | None:
    """Return the path that a user's word names, `~` expanded; None if nothing is there.

    A word that cannot be a path (too long, the home of an unknown user) names nothing.
    """
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None


def expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded; raise `ConfigError` if it is the home of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path} begins with the home of a user who is not known here."
        ) from error


def read_bytes(path: Path) -> bytes:
    """Return a file's content; raise `ConfigError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}.") from error


def read_text(path: Path) -> str:
    """Return a file's text; raise `ConfigError` if it cannot be read, or is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise `ConfigError` if there is none."""
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} does not contain a JSON object.")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file; raise `ConfigError` if it cannot be read."""
    try:
        return tomllib.loads(read_bytes(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _flush(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to disk, where its file system can (some network shares cannot)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
