"""Client updates that wait on disk, so that the server's memory does not grow with the cohort.

Where the disk is full they wait in memory.
"""

from __future__ import annotations

import logging
import tempfile
import weakref

import numpy as np

from grandrounds.errors import first_line
from grandrounds.wire.adapter import Adapter

_log = logging.getLogger("grandrounds")


class SetAside:
    """Changes by site, in one temporary file that is gone when this object is."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, list[str]]] = {}
        self._in_memory: dict[int, Adapter] = {}

    def put(self, partition: int, change: Adapter) -> None:
        """Keep a site's change, on disk if it fits there."""
        try:
            place = self._file.seek(0, 2)
            for tensor in change.values():
                np.save(self._file, tensor, allow_pickle=False)
        except OSError as error:
            if not self._in_memory:
                _log.warning(
                    "updates of this round wait in memory: %s cannot be written (%s)",
                    tempfile.gettempdir(),
                    first_line(error),
                )
            self._in_memory[partition] = change
        else:
            self._places[partition] = place, list(change)

    def take(self, partition: int) -> Adapter:
        """Return a site's change, as it was, and forget it."""
        if partition in self._in_memory:
            return self._in_memory.pop(partition)
        place, names = self._places.pop(partition)
        self._file.seek(place)
        return {name: np.load(self._file, allow_pickle=False) for name in names}
