"""The folder that Flower's processes of one command live in, and those that a kill left behind.

A folder is named `gr-…` and removed when the command ends. Its lock is held by the command and by
its keeper (`engines/keeper.py`): one that nobody holds belongs to a command that was killed, with
its keeper if it had one. Such a folder is removed at the next start if no process is in it. A
process is named, with the command that ends it, and never ended: only its user knows that nothing
else needs it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grandrounds.config.words import command, counted

if TYPE_CHECKING:
    import psutil

PREFIX = "gr-"
LOCK = "in-use"
LONGEST_PLACE_BYTES = 24
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals on which a command ends in order."""


@dataclass(frozen=True)
class Folder:
    """A folder of this command."""

    path: Path
    """Its path."""
    lock: int
    """File descriptor that holds its lock, for a keeper to inherit."""


def place() -> Path:
    """Return where the folders are: the system's temporary folder, or `/tmp` if its name is long.

    Ray keeps sockets below, whose paths are limited to 107 bytes, 83 of which are ours and Ray's.
    """
    usual, short = Path(tempfile.gettempdir()).resolve(), Path("/tmp")
    return short if len(os.fsencode(usual)) > LONGEST_PLACE_BYTES and short.is_dir() else usual


@contextlib.contextmanager
def own_folder() -> Iterator[Folder]:
    """Make a folder; remove it, however the block ends."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place()))
    try:
        lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        _locked(lock)
        try:
            yield Folder(path, lock)
        finally:
            os.close(lock)
    finally:
        with uninterrupted():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore a second Ctrl-C, and the like, during a clean-up of a few seconds."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def left_behind() -> list[str]:
    """Remove the folders that killed commands have left; return what a user should know, by line.

    A folder with processes in it stays, and its line says how to end them.
    """
    told = []
    for path in sorted(place().glob(f"{PREFIX}*")):
        with _unused(path) as is_ours:
            if not is_ours:
                continue
            if not (processes := _processes_in(path)):
                shutil.rmtree(path, ignore_errors=True)
                told.append(f"removed {path}, which a killed run had left")
                continue
            pids = [process.pid for process in processes]
            count = counted(len(processes), "process", "processes")
            end, remove = command("kill", "-9", *pids), command("rm", "-r", path)
            told.append(
                f"a killed run has left {count} of {path}: {', '.join(map(_named, processes))}. "
                f"To end them: {end}; then remove their folder: {remove}"
            )
    return told


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Yield whether a folder is this user's and held by nobody; it is held meanwhile."""
    lock = None
    with contextlib.suppress(OSError):  # just removed, or none of ours
        if path.stat().st_uid == os.getuid():
            lock = os.open(path / LOCK, os.O_RDWR)
    if lock is None:
        yield False
        return
    try:
        yield _locked(lock)
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    """Take a lock, unless another process holds it."""
    import fcntl  # not on Windows, where the other engine runs

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _processes_in(path: Path) -> list[psutil.Process]:
    """Return the processes whose working directory is in a folder.

    Flower and Ray are started there. It can be read even of processes that renamed themselves.
    """
    import psutil  # only where there is a folder to look for

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(path):
                found.append(process)
    return found


def _named(process: psutil.Process) -> str:
    import psutil

    try:
        return f"{process.pid} ({process.name()})"
    except psutil.Error:
        return f"{process.pid} (ended meanwhile)"
