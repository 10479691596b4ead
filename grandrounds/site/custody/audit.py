"""The audit log: one JSON line for each request to the site, and what left the site.

Every line holds the SHA-256 of the line before it, over all files of the log, so that a line that
is changed, inserted or removed afterwards is found (`verified`). A full file is renamed to
`audit-000001.jsonl` and so on; none is deleted. The end of the log protects nothing but itself: to
find lines removed from the end, keep the last hash elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import ConfigError, first_line
from grandrounds.site.custody.clock import utc_text
from grandrounds.storage import flush_folder, writing

FILE = "audit.jsonl"
"""The file that is written; full ones carry a number."""

LOCK = "audit.lock"

PREVIOUS = "previous"
"""Key of every line: the SHA-256 of the line before, without its line break."""

NOTHING = "0" * 64
"""The hash before the first line."""

ROTATE_BYTES = 16 * 2**20
"""Size from which a file is renamed and a new one begun."""

MOST_CHARACTERS = 2000
"""Maximum length of a string, which may come from a message."""

_BLOCK_BYTES = 65536


def write(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a line with the time in UTC, and flush it to disk.

    Only the agent's user can read the file (mode 0600). Processes and threads take turns. A last
    line that a power cut left incomplete is kept as it is, and the next one begins after it.

    Raises
    ------
    ConfigError
        If it cannot be written: nothing may leave the site unlogged.
    """
    short = {k: v[:MOST_CHARACTERS] if isinstance(v, str) else v for k, v in entry.items()}
    advice = "Free the disk, or give the agent's user access; until then the site answers nothing."
    with writing("The audit log", advice, ConfigError), _alone(folder):
        _rotate(folder)
        file = folder / FILE
        is_new = not file.exists()
        last, is_torn = _last_line(file)
        if is_new and (full := rotated(folder)):
            last, _ = _last_line(full[-1])
        stamped = {
            "time": utc_text(),
            PREVIOUS: NOTHING if last is None else hashlib.sha256(last).hexdigest(),
            **short,
        }
        line = f"{json.dumps(stamped)}\n".encode()  # ASCII, with no other line break
        _append(file, b"\n" * is_torn + line)
        if is_new:
            flush_folder(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the log's lock, which each writer opens for itself."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _rotate(folder: Path) -> None:
    """Rename a full file; the next number is one above the highest there is."""
    file = folder / FILE
    if not file.exists() or file.stat().st_size < ROTATE_BYTES:
        return
    full = rotated(folder)
    number = int(full[-1].stem.rpartition("-")[2]) + 1 if full else 1
    file.rename(folder / f"audit-{number:06}.jsonl")
    flush_folder(folder)


def _append(file: Path, content: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_line(file: Path) -> tuple[bytes | None, bool]:
    """Return the last line without its line break (None if there is none), and whether it lacks
    one."""
    if not file.exists():
        return None, False
    with file.open("rb") as handle:
        end = handle.seek(0, os.SEEK_END)
        if end == 0:
            return None, False
        tail = b""
        while True:
            start = max(0, end - len(tail) - _BLOCK_BYTES)
            handle.seek(start)
            tail = handle.read(end - start)
            is_torn = not tail.endswith(b"\n")
            lines = (tail if is_torn else tail[:-1]).split(b"\n")
            if len(lines) > 1 or start == 0:
                return lines[-1], is_torn


# --- Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the log."""

    file: str
    """Name of its file."""
    number: int
    """From 1 in each file."""
    sha256: str
    """Of its bytes, without the line break."""
    entry: Mapping[str, Any] | None
    """None if it is not a JSON object: torn by a power cut, or damaged."""

    @property
    def place(self) -> str:
        """File and number."""
        return f"{self.file}:{self.number}"


def rotated(folder: Path) -> list[Path]:
    """Return the full files, oldest first."""
    return sorted(p for p in folder.glob("audit-*.jsonl") if p.stem.rpartition("-")[2].isdecimal())


def lines(folder: Path) -> Iterator[Line]:
    """Yield every line, oldest first; raise `ConfigError` if a file cannot be read."""
    current = folder / FILE
    try:
        for file in [*rotated(folder), *([current] if current.exists() else [])]:
            with file.open("rb") as handle:
                for number, raw in enumerate(handle, 1):
                    text = raw.removesuffix(b"\n")
                    yield Line(file.name, number, hashlib.sha256(text).hexdigest(), _entry(text))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _entry(text: bytes) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # also text that is not UTF-8
        return None
    return found if isinstance(found, dict) else None


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the content of all lines but those that cannot be read."""
    return [dict(line.entry) for line in lines(folder) if line.entry is not None]


def latest(
    folder: Path, is_wanted: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any] | None:
    """Return the newest line that is wanted, file by file from the newest; None if there is none.

    Raises
    ------
    ConfigError
        If a file cannot be read.
    """
    current = folder / FILE
    try:
        for file in [*([current] if current.exists() else []), *reversed(rotated(folder))]:
            for text in reversed(file.read_bytes().splitlines()):
                if (entry := _entry(text)) is not None and is_wanted(entry):
                    return entry
    except OSError as error:
        raise _unreadable(folder, error) from error
    return None


def _unreadable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"The audit log in {folder} cannot be read: {first_line(error)}. Only the agent's user "
        "can read it."
    )


@dataclass(frozen=True)
class Verdict:
    """What `verified` found."""

    count: int
    """Lines."""
    before: int
    """Lines of the time before lines were chained, at the beginning."""
    torn: tuple[str, ...]
    """Places of lines that cannot be read but are where they were written."""
    broken: tuple[str, ...]
    """Where the chain breaks, in words."""
    last: str
    """SHA-256 of the last line."""
    holds_noted: bool
    """Whether the hash that was asked for is that of a line."""


def verified(folder: Path, noted: str = "") -> Verdict:
    """Return whether every line continues the one before it.

    Parameters
    ----------
    noted : str
        SHA-256 of a line, noted earlier; empty: none is looked for.
    """
    count = before = 0
    torn, broken = [], []
    previous, is_chained, holds_noted = NOTHING, False, not noted
    for line in lines(folder):
        count += 1
        holds_noted = holds_noted or line.sha256 == noted
        if line.entry is None:
            torn.append(line.place)
        elif PREVIOUS in line.entry:
            if line.entry[PREVIOUS] != previous:
                broken.append(_break(line, first=count == 1))
            is_chained = True
        elif is_chained:
            broken.append(f"{line.place} has no hash of the line before it")
        else:
            before += 1
        previous = line.sha256
    return Verdict(
        count, before, tuple(torn), tuple(broken), previous if count else NOTHING, holds_noted
    )


def _break(line: Line, *, first: bool) -> str:
    if first:
        return f"{line.place} continues a line that is not here: earlier files are missing"
    return f"{line.place} does not continue the line before it: one was changed or removed there"
