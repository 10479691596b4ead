"""Which examples a visit trains on: the site's secret decides, and no example comes back at will.

A secret of the site orders its examples, anew in every epoch, and a position moves forward through
them over all runs. Neither the run's seed nor the server's cursor plays a part, so the server
cannot have two visits whose examples differ by one that it chose.

An epoch leaves out an eighth to a quarter of the examples, how many and which ones by the secret:
otherwise two visits of all examples and of all but one would still differ by one.

What this does not do: the examples of each visit remain a function of the data, so updates add up
over many visits. It is no differential privacy.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from grandrounds.errors import ConfigError
from grandrounds.site.custody.state import SiteState
from grandrounds.site.custody.state_files import PARTIAL
from grandrounds.site.visit import Chosen, given_to_run
from grandrounds.storage import flush_folder

SECRET = "order.key"
SECRET_BYTES = 32

_SEEN = "grandrounds-seen"

Position = tuple[int, int]
"""Epoch, and examples given in it."""


def secret_of(folder: Path) -> bytes:
    """Return the site's secret, made once.

    Raises
    ------
    ConfigError
        If the file has another length: somebody changed it.
    """
    file = folder / SECRET
    if not file.exists():
        _make_secret(file)
    found = file.read_bytes()
    if len(found) != SECRET_BYTES:
        raise ConfigError(
            f"{file} has {len(found)} bytes, not {SECRET_BYTES}: it was cut short or replaced. "
            "Remove it; the site then orders its examples anew."
        )
    return found


def _make_secret(file: Path) -> None:
    """Write a secret, whole, unless another process was faster."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as written:
            written.write(secrets.token_bytes(SECRET_BYTES))
            written.flush()
            os.fsync(written.fileno())
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink()
    flush_folder(file.parent)


@lru_cache(maxsize=4)
def epoch_order(secret: bytes, epoch: int, num_examples: int) -> NDArray[np.int64]:
    """Return the indices of an epoch's examples, in order.

    Each example's rank, and how many are left out at the end, are outputs of SHAKE-256 keyed by
    HMAC-SHA-256 of the secret.
    """
    key = hmac.digest(secret, f"order {epoch} {num_examples}".encode(), "sha256")
    stream = hashlib.shake_256(key).digest(8 * (num_examples + 1))
    ranks = np.frombuffer(stream, dtype="<u8")
    eighth = num_examples // 8
    left_out = eighth + int(ranks[0]) % (eighth + 1)
    order: NDArray[np.int64] = np.argsort(ranks[1:], kind="stable")[: num_examples - left_out]
    return order


def next_examples(
    secret: bytes, position: Position, num_examples: int, count: int
) -> tuple[list[int], Position]:
    """Return the indices of the next `count` examples, and the position after them."""
    epoch, place = position
    indices: list[int] = []
    while True:
        order = epoch_order(secret, epoch, num_examples)
        taken = order[place : place + count - len(indices)]
        indices += taken.tolist()
        place += len(taken)
        if len(indices) == count:
            return indices, (epoch, place)
        epoch, place = epoch + 1, 0


def choose(
    state: SiteState, position: Position, kept: RecordDict, sizes: tuple[int, int]
) -> Chosen:
    """Return the examples of a visit, and note them in the run's state.

    Parameters
    ----------
    kept
        What the site keeps of the run; `Chosen.seen` counts over its visits.
    sizes
        Training examples of the site, and examples of the visit.
    """
    num_examples, count = sizes
    indices, _ = next_examples(secret_of(state.folder), position, num_examples, count)
    return Chosen(tuple(indices), given_to_run(kept), _seen(kept, indices, num_examples))


def _seen(kept: RecordDict, indices: list[int], num_examples: int) -> int:
    """Mark examples as given to the run; return how many are. Other data start at none."""
    marks = np.zeros(num_examples, dtype=np.uint8)
    record = kept.array_records.get(_SEEN)
    if record is not None and f"{num_examples}" in record:
        marks |= np.unpackbits(record[f"{num_examples}"].numpy(), count=num_examples)
    marks[indices] = 1
    kept[_SEEN] = ArrayRecord({f"{num_examples}": Array(np.packbits(marks))})
    return int(marks.sum())
