"""Records in files of the state folder: written whole or not at all, readable by one user only."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from grandrounds.storage import flush_folder

_LENGTH = struct.Struct(">Q")

PARTIAL = ".partial"
"""Ending of a file that is being written."""


def write_records(path: Path, records: RecordDict) -> int:
    """Write records to a new file and flush it to disk; return its bytes.

    Each array is a part of its own, because protobuf limits one message to 2 GiB.

    Raises
    ------
    OSError
        If the folder is not writable, or the disk is full; nothing is left behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in _parts(records):
                packed = recorddict_to_proto(part).SerializeToString()
                file.write(_LENGTH.pack(len(packed)))
                file.write(packed)
            file.write(_LENGTH.pack(0))  # the end: a file that was cut short lacks it
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)
    return size


def read_records(path: Path) -> RecordDict:
    """Return the records of a file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not complete.
    """
    found = RecordDict()
    with path.open("rb") as file:
        while True:
            head = file.read(_LENGTH.size)
            length = int.from_bytes(head)
            packed = file.read(length)
            if len(head) < _LENGTH.size or len(packed) < length:
                raise ValueError(f"{path.name} ends early")
            if not length:
                return found
            for name, record in recorddict_from_proto(ProtoRecordDict.FromString(packed)).items():
                if isinstance(record, ArrayRecord) and name in found:
                    found.array_records[name].update(record)
                else:
                    found[name] = record


def _parts(records: RecordDict) -> Iterator[RecordDict]:
    """Yield records with one array, or one record of another kind, each."""
    for name, record in records.items():
        if isinstance(record, ArrayRecord) and len(record) > 1:
            for key, array in record.items():
                yield RecordDict({name: ArrayRecord({key: array})})
        else:
            yield RecordDict({name: record})
