"""Client updates that wait on disk, so that the server's memory does not grow with the cohort."""

from __future__ import annotations

import tempfile
import weakref

import numpy as np

from grandrounds.wire.adapter import Adapter


class SetAside:
    """Changes by site, in one temporary file that is gone when this object is."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, list[str]]] = {}

    def put(self, partition: int, change: Adapter) -> None:
        """Write a site's change."""
        self._places[partition] = self._file.seek(0, 2), list(change)
        for tensor in change.values():
            np.save(self._file, tensor, allow_pickle=False)

    def take(self, partition: int) -> Adapter:
        """Return a site's change, as it was."""
        place, names = self._places[partition]
        self._file.seek(place)
        return {name: np.load(self._file, allow_pickle=False) for name in names}
