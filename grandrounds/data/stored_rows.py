"""Rows of a large source: their texts lie on the disk and are read one by one.

In memory are 8 bytes a row for its place in the spool, 8 for its place in a selection, and 4 for
each label.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from grandrounds.data.conversations import Turn
from grandrounds.data.forms import APART
from grandrounds.data.rows import Rows
from grandrounds.data.spool import Spool

Index = NDArray[np.int64]
Record = tuple[str, str, tuple[Turn, ...], str]
"""Question, answer, what was said before the question, and the instruction if it is apart."""


@dataclass(frozen=True)
class Labels:
    """A column of few different values."""

    values: Sequence[Any]
    """The different values, by first occurrence."""
    numbers: NDArray[np.int32]
    """Each row's position in `values`."""

    def of(self, row: int) -> Any:
        """Return a row's value."""
        return self.values[self.numbers[row]]


class Table:
    """All rows of a source."""

    def __init__(
        self, spool: Spool, columns: tuple[str, ...], labels: dict[str, Labels], commit: str = ""
    ) -> None:
        self._spool = spool
        self.columns = columns
        """Of the question and of the answer, and `forms.APART` if instructions are apart."""
        self.labels = labels
        self.commit = commit
        self._last: tuple[int, Record] = (-1, ("", "", (), ""))

    def __len__(self) -> int:
        return len(self._spool)

    def record(self, row: int) -> Record:
        """Return what a row says; the last one is remembered, for the columns are read together."""
        known, record = self._last
        if known == row:
            return record
        record = cast(Record, marshal.loads(self._spool[row]))  # written by this process alone
        self._last = row, record
        return record


def packed(record: Record) -> bytes:
    """Return a row as it is spooled."""
    return marshal.dumps(record)


class StoredRows(Rows):
    """Some rows of a table, in some order."""

    def __init__(self, table: Table, index: Index | None = None) -> None:
        self._table = table
        self._index: Index = np.arange(len(table)) if index is None else index
        self.commit = table.commit

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, name: str) -> Sequence[Any]:
        table = self._table
        if name == APART:
            return self._part(3)
        if name in table.columns:
            return self._part(table.columns.index(name))
        return _Column(self._index, table.labels[name].of)

    def _part(self, number: int) -> _Column:
        record = self._table.record
        return _Column(self._index, lambda row: record(row)[number])

    @property
    def is_stored(self) -> bool:
        return True

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys((*self._table.columns, *self._table.labels)))

    @property
    def histories(self) -> Sequence[tuple[Turn, ...]]:
        return self._part(2)

    def reader(self, names: tuple[str, str]) -> Callable[[int], tuple[Any, ...]]:
        if names != self._table.columns[:2]:
            return super().reader(names)
        end, index, record = 3 + (APART in self._table.columns), self._index, self._table.record
        return lambda place: record(int(index[place]))[:end]

    def shuffle(self, seed: int) -> Rows:
        return StoredRows(
            self._table, self._index[np.random.default_rng(seed).permutation(len(self))]
        )

    def select(self, indices: Sequence[int]) -> Rows:
        chosen = np.asarray(indices, dtype=np.int64)
        return StoredRows(self._table, self._index[chosen])


class _Column(Sequence[Any]):
    """A value of each row, read when it is asked for."""

    def __init__(self, index: Index, value_of: Callable[[int], Any]) -> None:
        self._index, self._value_of = index, value_of

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self._value_of(int(row)) for row in self._index[place]]
        return self._value_of(int(self._index[place]))


class LabelBuilder:
    """Collects the labels of a column, as the source holds them."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[type, Any], int] = {}
        self.values: list[Any] = []
        self.numbers = array("i")

    def add(self, value: Any) -> None:
        """Append the label of the next row."""
        self.numbers.append(self.number(value))

    def number(self, value: Any) -> int:
        """Return the number of a label; 1.10 and 1.1 of a JSON file are different ones."""
        if isinstance(value, list | dict):
            value = str(value)
        value = None if value != value else value  # NaN differs from itself
        key = type(value), getattr(value, "text", value)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]
