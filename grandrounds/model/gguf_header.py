"""The header of a GGUF file: its values and tensors, checked against the length of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The reader of the package `gguf` follows counts that the file states and can loop without end on a
hostile one; a file is given to it only after this check.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_MOST_DIMENSIONS = 4
_KEPT_BYTES = 2**20
"""Longest text that is kept."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file."""

    name: str
    values: int
    """Number of its values."""
    type: int
    """Number of its storage type (GGMLQuantizationType)."""
    offset: int
    """Bytes from the start of the tensors' data."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file states about its model."""

    values: dict[str, Any]
    """Numbers and texts by key; arrays are left out."""
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    """Where the tensors' data begin, in bytes."""
    file_bytes: int

    def text(self, key: str) -> str | None:
        """Return a text; None if the file has none under this key."""
        found = self.values.get(key)
        return found if isinstance(found, str) and found.strip() else None

    @property
    def architecture(self) -> str:
        """The model's architecture as llama.cpp names it; empty if not stated."""
        return self.text("general.architecture") or ""

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.values for tensor in self.tensors)


def read_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises
    ------
    ModelError
        If the file cannot be read, is not a GGUF file, or contradicts its own length.
    """
    try:
        with file.open("rb") as handle:
            if handle.read(4) != MAGIC:
                raise ModelError(f"{file} is not a GGUF file: it does not start with GGUF.")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).header()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise ModelError(
            f"{file} is damaged or incomplete: {error}. Obtain it again, and compare its SHA-256."
        ) from error


class _Reader:
    """A position in a GGUF file; every read is checked against the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def header(self) -> GgufHeader:
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version}, allowed: 2 and 3, little-endian")
        tensor_count, value_count = self._scalar("Q"), self._scalar("Q")
        # A key takes 8 bytes for its length and 4 for its type; a tensor 8 + 4 + 4 + 8.
        self._room(12 * value_count + 24 * tensor_count, "the values and tensors it announces")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._text()
            if key in values:
                raise ValueError(f"the key {key[:80]!r} occurs twice")
            values[key] = self._value(self._scalar("I"))
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment = {alignment!r} is not a power of two")
        start = -(-self._at // alignment) * alignment
        kept = {key: value for key, value in values.items() if value is not None}
        return GgufHeader(kept, tensors, start, len(self._data))

    def _room(self, count: int, what: str) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(f"it ends before {what}")

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self._room(size, f"byte {self._at + size:,}")
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += size
        return value

    def _text(self) -> str:
        length = self._scalar("Q")
        self._room(length, f"a text of {length:,} bytes")
        start, self._at = self._at, self._at + length
        return self._data[start : min(self._at, start + _KEPT_BYTES)].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """Return a value; None for an array, whose length is checked."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        of, count = self._scalar("I"), self._scalar("Q")
        if of in _SCALARS:
            size = count * struct.calcsize(f"<{_SCALARS[of]}")
            self._room(size, f"an array of {count:,} numbers")
            self._at += size
            return None
        if of != _STRING:
            raise ValueError(f"an array of type {of}")
        self._room(8 * count, f"an array of {count:,} texts")
        for _ in range(count):
            length = self._scalar("Q")
            self._room(length, f"a text of {length:,} bytes")
            self._at += length
        return None

    def _tensor(self) -> GgufTensor:
        name, dimensions = self._text(), self._scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:80]!r} has {dimensions} dimensions")
        shape = [self._scalar("Q") for _ in range(dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        return GgufTensor(name, math.prod(shape), kind, offset)
