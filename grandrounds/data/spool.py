"""Records in an unnamed file on the disk: appended in order, read at random, gone with their owner.

The file has no name, so that it is freed when the process ends, however it ends, and no other one
can take it for whole. Only this user can read it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from grandrounds.errors import DataError
from grandrounds.storage import writing

FOLDER_VARIABLE = "TMPDIR"

_ON_DISK = "/var/tmp"
_BUFFER_BYTES = 1 << 20


def spool_folder() -> Path:
    """Return the folder of unnamed files: `TMPDIR` if it is set, else /var/tmp where it is."""
    if not os.environ.get(FOLDER_VARIABLE) and os.access(_ON_DISK, os.W_OK):
        return Path(_ON_DISK)
    return Path(tempfile.gettempdir())


class Spool:
    """An immutable sequence of records once the last one is appended."""

    def __init__(self, needed_bytes: int, subject: str) -> None:
        """Open an unnamed file.

        Parameters
        ----------
        needed_bytes : int
            What it will hold, approximately.
        subject : str
            What it is needed for, as the beginning of an error's sentence.

        Raises
        ------
        DataError
            If the folder cannot be written to, or has no room for it.
        """
        self._folder, self._subject = spool_folder(), subject
        with self._writing():
            free_bytes = shutil.disk_usage(self._folder).free
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed with its owner
                buffering=_BUFFER_BYTES, dir=self._folder
            )
        weakref.finalize(self, self._file.close)
        if free_bytes < needed_bytes:
            raise DataError(
                f"{subject}: it is too large to be held in memory, and {self._folder} has "
                f"{free_bytes / 1e9:.1f} GB free where about {needed_bytes / 1e9:.1f} GB are "
                f"needed. Make room, or set {FOLDER_VARIABLE} to a folder on another disk."
            )
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def extend(self, records: Iterable[bytes]) -> None:
        """Write the next records; raise `DataError` if the disk is full."""
        written = list(records)
        with self._writing():
            self._file.writelines(written)
        for record in written:
            self._ends.append(self._ends[-1] + len(record))

    def finish(self) -> None:
        """Write what is buffered; raise `DataError` if the disk is full."""
        with self._writing():
            self._file.flush()

    def __getitem__(self, number: int) -> bytes:
        """Return a record, after `finish`."""
        start, stop = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), stop - start, start)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(
            f"{self._subject}: its rows in {self._folder}",
            f"Make room, or set {FOLDER_VARIABLE} to a folder on another disk.",
            DataError,
        )
