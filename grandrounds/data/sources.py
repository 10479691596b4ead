"""Reads the rows of a data source: built-in data, a local file or a hub data set.

The result is always `Rows`, in the source's order, with the question and the answer as text and the
columns needed for partitioning: in memory, or on the disk if the source is large.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from grandrounds.data.alone import columns_read_alone, rows_alone
from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.files import (
    Choice,
    RawRows,
    check_same_columns,
    from_records,
    from_table,
    read_file,
    table_chunks,
)
from grandrounds.data.forms import PREFERRED
from grandrounds.data.main_memory import check_fits
from grandrounds.data.pairs import columns_of_pairs, rows_of_pairs
from grandrounds.data.places import (
    BUILT_IN,
    FILE_ENDINGS,
    SOURCE_KEY,
    OnHub,
    Version,
    files_of,
    looks_like_path,
    name_in,
    unreadable,
)
from grandrounds.data.preferences import Preferences, columns_of_preferences, preferences_of
from grandrounds.data.read import as_read, columns_read, settled_layout
from grandrounds.data.rows import Rows
from grandrounds.data.streams import CHUNK_ROWS
from grandrounds.errors import DataError, first_line, nearest

_CACHED_SOURCES = 4

HELD_FACTOR = 20
"""Bytes of memory for a byte of a source whose rows and tokens are held there, as measured."""

_HELD = (
    "Under a guarantee all rows of a site are held in memory. Use fewer of them, or a machine with "
    "more."
)

_PAIRS_HELD = (
    "All preferences of a source are held in memory. Use fewer of them, or a machine with more."
)


def load_rows(
    source: str,
    *,
    question_column: str,
    answer_column: str,
    keep_columns: Sequence[str] = (),
    alone: bool = False,
) -> Rows:
    """Return the rows of a data source, with questions and answers as text.

    A source is read once per process: the same arguments return the same object until the file
    changes (path, modification time or length).

    Parameters
    ----------
    source : str
        One of `EMBEDDED`; a local file, folder or pattern (any name that has one of `FILE_ENDINGS`,
        starts with `.`, `/` or `~`, holds `*` or `?`, or exists); otherwise a data set on the hub,
        as `places.OnHub` writes it.
    question_column, answer_column : str
        Columns with the question and the answer. A missing value becomes an empty string and a
        number its text; any other type is an error. FlowerTune's medical app uses `input` as the
        question and `output` as the answer, and drops `instruction`, which is the same in all rows;
        if it differs, both make the question. `instruction,input` joins two columns by a space, as
        its finance and code apps do, unless there is a column of that name. If these are the
        columns and the source has none of the name, other forms are looked for: see `forms`.
    keep_columns : sequence of str
        Further columns, such as the one that names the site. Integers stay integers, all else
        becomes text, and missing values, blank ones among them, stay missing. Labels of a CSV or
        JSON file are taken as they are written: 001 and 01, or 1.1 and 1.10, are different, and NA
        is one.
    alone : bool
        Whether no row may decide how another one is read: see `data.alone`.

    Returns
    -------
    Rows
        Exactly the requested columns, under their own names.

    Raises
    ------
    DataError
        If the source cannot be found or read, has no rows, lacks a column, or contains a value that
        is not text.
    """
    columns = (question_column, answer_column, *keep_columns)
    if source in EMBEDDED:
        return _load_embedded(source, columns)
    if looks_like_path(source):
        return _load_files(source, files_of(source), columns, alone)
    return _load_hub(source, columns, alone)


def load_pairs(source: str, columns: tuple[str, ...]) -> Rows:
    """Return the rows of a source of preferences, all in memory.

    A source is read once per process, as by `load_rows`.

    Parameters
    ----------
    source : str
        As of `load_rows`.
    columns
        Those of question, chosen and rejected answer, see `pairs.names_of`, then further ones, such
        as the one that names the site.

    Raises
    ------
    DataError
        If the source cannot be read, lacks a column, or has no row with two different answers to
        one prompt.
    """
    version = files_of(source) if source not in EMBEDDED and looks_like_path(source) else ()
    return _load_pairs(source, version, columns)


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_pairs(source: str, version: Version, columns: tuple[str, ...]) -> Rows:
    choose, commit = columns_of_pairs(columns), ""
    if source in EMBEDDED:
        raw = from_records(enumerate(embedded_rows(source), 1), choose, "row")
    elif version:
        from grandrounds.data.large import is_large, total_bytes  # only here: NumPy

        if is_large(version):
            check_fits(source, total_bytes(version), HELD_FACTOR, _PAIRS_HELD)
        raw = read_pairs(source, version, columns)
    else:
        rows = _hub_rows(source)
        commit, available = hub_commit(rows), tuple(rows.column_names)
        raw = from_table(rows.with_format("arrow")[:], choose(available), available)
    return rows_of_pairs(raw, source, columns, commit)


def read_pairs(source: str, version: Version, columns: tuple[str, ...]) -> RawRows:
    """Return the rows of all files of a source of preferences; columns as of `load_pairs`."""
    return _read_all(source, version, columns_of_pairs(columns), columns[3:], alone=False)


def load_preferences(source: str) -> Preferences:
    """Return the preferences of a data source; see `preferences`.

    Raises
    ------
    DataError
        If the source cannot be read, or lacks a column.
    """
    if looks_like_path(source):
        raw = _read_all(source, files_of(source), columns_of_preferences, (), alone=False)
    else:
        rows = _hub_rows(source)
        available = tuple(rows.column_names)
        whole = rows.with_format("arrow")[:]
        raw = from_table(whole, columns_of_preferences(available), available)
    if missing := [name for name in PREFERRED if name not in raw.values]:
        raise DataError(
            f"{source}: there is no column {missing[0]!r}; preferences have the columns prompt, "
            f"chosen and rejected, and these are: {', '.join(raw.available)}."
        )
    return preferences_of(raw)


def rows_of(raw: RawRows, source: str, columns: tuple[str, ...], alone: bool = False) -> Rows:
    """Check that rows and columns exist, and convert their values to text."""
    if alone:
        return rows_alone(raw, columns)
    read = as_read(raw, source, columns)
    return Rows(read.values, histories=read.histories)


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_embedded(source: str, columns: tuple[str, ...]) -> Rows:
    raw = from_records(enumerate(embedded_rows(source), 1), columns_read(columns), "row")
    return rows_of(raw, source, columns)


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_hub(source: str, columns: tuple[str, ...], alone: bool) -> Rows:
    from grandrounds.data.large import STORED_BYTES, form_note, left_out_note, stored

    rows = _hub_rows(source)
    available = tuple(rows.column_names)
    choose = columns_read_alone(columns) if alone else columns_read(columns)
    if not alone and rows.data.nbytes > STORED_BYTES:
        read = choose(available)

        def chunks() -> Iterator[tuple[str, RawRows]]:
            tables = rows.with_format("arrow").iter(CHUNK_ROWS)
            for raw in table_chunks(tables, read, available, CHUNK_ROWS):
                yield source, raw

        return stored(chunks, source, columns, rows.data.nbytes, hub_commit(rows), is_told=True)
    raw = from_table(rows.with_format("arrow")[:], choose(available), available)
    if alone:
        return rows_alone(raw, columns)
    found = as_read(raw, source, columns)
    form_note(source, settled_layout(raw, source, columns), available, columns)
    left_out_note(source, len(found.left_out), len(raw.places), next(iter(found.left_out), ""))
    return Rows(found.values, hub_commit(rows), found.histories)


def _hub_rows(source: str) -> Any:
    """Return a data set of the hub; raise `DataError` if it cannot be loaded."""
    import datasets

    place = OnHub.of(source)
    named = {"name": place.config} if place.config else {}
    named |= {"revision": place.revision} if place.revision else {}
    try:
        with silent_downloads():
            rows = datasets.load_dataset(place.name, split=place.split, **named)
    except Exception as error:  # the hub, HTTP and builders raise unrelated types
        raise DataError(
            f"{SOURCE_KEY} = {source!r} is neither {BUILT_IN} nor a file that exists, and "
            f"could not be loaded from the Hugging Face hub ({first_line(error)})."
            f"{nearest(place.name, EMBEDDED)} Check the name, static.dataset.config and -split, "
            f"the network and HF_HUB_OFFLINE, or set {SOURCE_KEY} to a local file "
            f"({', '.join(FILE_ENDINGS)}) or to {BUILT_IN}."
        ) from error
    return rows


def hub_commit(rows: Any) -> str:
    """Return the commit of a `datasets.Dataset` from the hub, if its cache tells it; else empty."""
    urls = " ".join(rows.info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", urls)
    return commit[1] if commit else ""


@contextmanager
def silent_downloads() -> Iterator[None]:
    """Disable the hub's progress bars and log messages within the context."""
    import datasets
    import huggingface_hub

    libraries: tuple[Any, ...] = (datasets.utils, huggingface_hub.utils)
    loud = [library for library in libraries if not library.are_progress_bars_disabled()]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    for library in loud:
        library.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        for library in loud:
            library.enable_progress_bars()


# --- Local files ----------------------------------------------------------------------------------


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_files(source: str, version: Version, columns: tuple[str, ...], alone: bool) -> Rows:
    """Read files; their version is part of the cache key, so that changed ones are read again."""
    from grandrounds.data.large import is_large, large_files, total_bytes  # only here: NumPy

    if is_large(version):
        if not alone:
            return large_files(source, version, columns)
        check_fits(source, total_bytes(version), HELD_FACTOR, _HELD)
    return rows_of(read_files(source, version, columns, alone), source, columns, alone)


def read_files(
    source: str, version: Version, columns: tuple[str, ...], alone: bool = False
) -> RawRows:
    """Return the rows of all files of a source, one after the other.

    Raises
    ------
    DataError
        If a file is damaged, or one has other columns of questions and answers than the first.
    """
    choose = columns_read_alone(columns) if alone else columns_read(columns)
    return _read_all(source, version, choose, columns[2:], alone=alone)


def _read_all(
    source: str, version: Version, choose: Choice, labels: Sequence[str], *, alone: bool
) -> RawRows:
    read = []
    for path, _, _ in version:
        name = name_in(version, path, source)
        try:
            raw = read_file(path, name, choose, () if alone else labels)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise unreadable(name, error) from error
        read.append((name, raw))
    _, first = read[0]
    if not alone:
        wanted = [name for name in choose(first.available) if name in first.available]
        check_same_columns({name: raw.available for name, raw in read}, wanted)
    return first if len(read) == 1 else joined(read)


def joined(read: Sequence[tuple[str, RawRows]]) -> RawRows:
    """Return the rows of several files as those of one source."""
    names = dict.fromkeys(name for _, raw in read for name in raw.values)
    available = dict.fromkeys(name for _, raw in read for name in raw.available)
    return RawRows(
        values={
            name: [
                value for _, raw in read for value in raw.values.get(name, [None] * len(raw.places))
            ]
            for name in names
        },
        available=tuple(available),
        places=[place for _, raw in read for place in raw.places],
        unit=read[0][1].unit,
        files=[(Path(file).name, len(raw.places)) for file, raw in read],
    )
