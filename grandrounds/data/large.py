"""Reads sources that would fill the memory: their rows go to a spool on the disk.

What all rows decide together, a source's form and its columns, is guessed from the first ones. If
that is wrong, the source is read again. The rows are those that `sources` gives of a small one.
"""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from grandrounds.data.files import SEPARATORS, RawRows, check_same_columns, csv_labels
from grandrounds.data.forms import APART, INSTRUCTION, Layout
from grandrounds.data.places import SURVEYED_BYTES, Version, name_in, unreadable
from grandrounds.data.read import (
    columns_read,
    columns_used,
    instructions_of,
    labels_of,
    no_answers,
    settled_layout,
    texts_of,
)
from grandrounds.data.rows import Rows
from grandrounds.data.spool import Spool
from grandrounds.data.stored_rows import LabelBuilder, Labels, StoredRows, Table, packed
from grandrounds.data.streams import chunks_of
from grandrounds.errors import DataError

STORED_BYTES = 32 * 2**20
"""Largest source whose rows are held in memory: with their tokens they take 0.6 GB there."""

_PACKED = (".gz", ".parquet")
_PACKED_FACTOR = 4

MOST_NAMED = 5
"""Columns that are named of those that nobody reads."""

_DECISIVE = 3
"""Values of a column beyond which further ones decide nothing: blank and two instructions."""

Chunks = Callable[[], Iterator[tuple[str, RawRows]]]
"""Reads a source from its beginning: some rows at a time, with the name of their file."""


def total_bytes(version: Version) -> int:
    """Return about how many bytes the rows of files are; compressed ones count four times."""
    return sum(
        size_bytes * (_PACKED_FACTOR if path.name.lower().endswith(_PACKED) else 1)
        for path, _, size_bytes in version
    )


def is_large(version: Version) -> bool:
    """Whether the rows of files are stored on the disk."""
    return total_bytes(version) > STORED_BYTES


def large_files(source: str, version: Version, columns: tuple[str, ...]) -> Rows:
    """Return the rows of files as `sources.load_rows` describes them, stored on the disk.

    Raises
    ------
    DataError
        If a file is damaged, or cannot be used, or the disk is full.
    """

    def chunks() -> Iterator[tuple[str, RawRows]]:
        for path, _, _ in version:
            name = name_in(version, path, source)
            try:
                for raw in chunks_of(path, name, columns_read(columns)):
                    files = ((path.name, len(raw.places)),) if len(version) > 1 else ()
                    yield name, replace(raw, files=files)
            except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
                raise unreadable(name, error) from error

    is_told = sum(size_bytes for _, _, size_bytes in version) > SURVEYED_BYTES
    return stored(chunks, source, columns, total_bytes(version), is_told=is_told)


def stored(
    chunks: Chunks,
    source: str,
    columns: tuple[str, ...],
    needed_bytes: int,
    commit: str = "",
    *,
    is_told: bool,
) -> Rows:
    """Store the rows of a source on the disk.

    Conversations that cannot be trained on are counted on stderr: nothing else tells it of a large
    source.

    Parameters
    ----------
    needed_bytes : int
        Room that they take, approximately.
    commit : str
        Of the hub's data set, where it is known.
    is_told : bool
        Whether to tell the form on stderr, as of a source that no survey has read before.
    """
    found, every = None, _Seen(columns)
    with suppress(DataError):  # told by the second reading, if it was no wrong guess
        found = _guessed(chunks, source, columns, needed_bytes, every)
    if found is None:
        every = _Seen(columns)
        deque(every.watching(chunks()), maxlen=0)
        found = _written(chunks(), source, columns, every.layout(source), needed_bytes)
    if is_told:
        form_note(source, every.layout(source), every.available, columns)
    return found.rows(source, commit)


def _guessed(
    chunks: Chunks, source: str, columns: tuple[str, ...], needed_bytes: int, every: _Seen
) -> _Written | None:
    """Write a source as its first rows have it; None if all rows together have another layout."""
    first = _Seen(columns)
    deque(first.watching(islice(chunks(), 1)), maxlen=0)
    layout = first.layout(source)
    found = _written(every.watching(chunks()), source, columns, layout, needed_bytes)
    return found if every.layout(source) == layout else None


@dataclass
class _Written:
    """A source on the disk."""

    spool: Spool
    columns: tuple[str, ...]
    labels: dict[str, _Column]
    left_out: int = 0
    first_left_out: str = ""

    def rows(self, source: str, commit: str) -> Rows:
        """Return the rows; tell what is left out."""
        settled = {
            name: column.settled(f"{source}, column {name!r}")
            for name, column in self.labels.items()
        }
        left_out_note(source, self.left_out, len(self.spool), self.first_left_out)
        return StoredRows(Table(self.spool, self.columns, settled, commit))


def _written(
    chunks: Iterator[tuple[str, RawRows]],
    source: str,
    columns: tuple[str, ...],
    layout: Layout,
    needed_bytes: int,
) -> _Written:
    """Write all rows to a spool."""
    own = columns[:2] + (APART,) * (APART in columns)
    labels = {name: _Column() for name in columns if name not in own}
    found = _Written(Spool(needed_bytes, source), own, labels)
    for file, raw in chunks:
        texts = texts_of(raw, source, layout)
        histories = texts.histories or [()] * len(texts.questions)
        apart = instructions_of(raw, source, columns, layout) if APART in own else repeat("")
        rows = zip(texts.questions, texts.answers, histories, apart, strict=False)
        found.spool.extend(map(packed, rows))
        for name, column in labels.items():
            column.add(file, raw.values[name])
        found.left_out += len(texts.left_out)
        found.first_left_out = found.first_left_out or next(iter(texts.left_out), "")
    found.spool.finish()
    return found


def left_out_note(source: str, left_out: int, rows: int, first: str) -> None:
    """Count on stderr the conversations of a source that cannot be trained on, if there are any."""
    if left_out:
        print(
            f"grandrounds: {source}: {left_out:,} of {rows:,} conversations are not trained on; "
            f"the first: {first}",
            file=sys.stderr,
        )


def form_note(
    source: str, layout: Layout, available: Sequence[str], columns: tuple[str, ...]
) -> None:
    """Tell on stderr in which form a source is read, and which of its columns nobody reads."""
    used = columns_used(layout, columns)
    unread = [name for name in available if name not in used]
    found = [f"read as {layout.description}"] if layout.description else []
    found += [f"columns that are not read: {', '.join(unread[:MOST_NAMED])}"] if unread else []
    if found:
        print(f"grandrounds: {source}: {'; '.join(found)}", file=sys.stderr)


class _Seen:
    """What decides where questions and answers are, of the rows that were read."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._of_files: dict[str, tuple[str, ...]] = {}
        self._values: dict[str, dict[str, Any]] = {}

    def watching(self, chunks: Iterable[tuple[str, RawRows]]) -> Iterator[tuple[str, RawRows]]:
        """Yield what is read, and remember what decides."""
        for file, raw in chunks:
            self._of_files[file] = raw.available
            for name, values in raw.values.items():
                found = self._values.setdefault(name, {})
                if len(found) < _DECISIVE:
                    found |= {key: v for v in values if (key := _decisive(name, v)) is not None}
            yield file, raw

    @property
    def available(self) -> tuple[str, ...]:
        """All columns of the files."""
        return tuple(dict.fromkeys(chain.from_iterable(self._of_files.values())))

    def layout(self, source: str) -> Layout:
        """Return where questions and answers are; raise `DataError` as `settled_layout` does."""
        if self._of_files:
            first = next(iter(self._of_files.values()))
            wanted = [name for name in columns_read(self._columns)(first) if name in first]
            check_same_columns(self._of_files, wanted)
        values = {name: list(found.values()) for name, found in self._values.items()}
        raw = RawRows(values, self.available, range(len(self._of_files)), "row")
        layout = settled_layout(raw, source, self._columns)
        if layout.form == "preferences":
            raise no_answers(raw, source)
        return layout


def _decisive(name: str, value: Any) -> str | None:
    """Return a key of what a value decides of the layout; None if it decides nothing."""
    if isinstance(value, list):
        return "turns"
    return value.strip() if name == INSTRUCTION and isinstance(value, str) else None


class _Column:
    """The labels of a column, as each file has them."""

    def __init__(self) -> None:
        self._of_files: dict[str, LabelBuilder] = {}

    def add(self, file: str, values: Sequence[Any]) -> None:
        """Append the labels of the next rows."""
        labels = self._of_files.setdefault(file, LabelBuilder())
        for value in values:
            labels.add(value)

    def settled(self, where: str) -> Labels:
        """Return all labels as integers or text; raise `DataError` as `read.labels_of` does."""
        together = LabelBuilder()
        numbers = []
        for file, labels in self._of_files.items():
            is_csv = Path(file.lower().removesuffix(".gz")).suffix in SEPARATORS
            values = csv_labels(labels.values) if is_csv else labels.values
            number_of = np.array([together.number(value) for value in values], dtype=np.int32)
            numbers.append(number_of[np.frombuffer(labels.numbers, dtype=np.int32)])
        return Labels(labels_of(together.values, where), np.concatenate(numbers))
