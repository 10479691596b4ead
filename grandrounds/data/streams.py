"""Reads a file some rows at a time, in the forms where that is possible.

JSON lines (also in a `.json` file, one object on each line), CSV, TSV, Parquet and plain text are;
an array of JSON is read whole.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from grandrounds.data.files import (
    PEEKED_RECORDS,
    SEPARATORS,
    Choice,
    RawRows,
    csv_batches,
    json_lines,
    parquet_batches,
    read_file,
)
from grandrounds.data.main_memory import check_fits
from grandrounds.data.paragraphs import paragraphs

CHUNK_ROWS = 2000

_PEEKED_BYTES = 1 << 20

_ARRAY_FACTOR = 4
_ARRAY = (
    "An array of JSON is parsed as a whole. Write one object on each line instead, such as by "
    "jq -c '.[]' FILE."
)


def chunks_of(path: Path, source: str, choose: Choice) -> Iterator[RawRows]:
    """Yield a file's rows in their order, each time with all columns that were seen so far.

    Labels of a CSV file are text, as they are written. Parameters and errors are those of
    `files.read_file`.
    """
    name = path.name.lower()
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as opened:
        file = cast(IO[bytes], opened)
        ending = Path(name.removesuffix(".gz")).suffix
        if ending == ".parquet":
            yield from parquet_batches(file, source, choose, CHUNK_ROWS)
        elif ending in SEPARATORS:
            yield from csv_batches(file, source, choose, SEPARATORS[ending], CHUNK_ROWS)
        elif ending == ".txt":
            yield from _record_chunks(paragraphs(file), choose)
        elif is_read_by_rows(path):
            yield from _record_chunks(json_lines(file, source), choose)
        else:
            check_fits(source, path.stat().st_size, _ARRAY_FACTOR, _ARRAY)
            yield read_file(path, source, choose)


def is_read_by_rows(path: Path) -> bool:
    """Whether a file is of a form that is read some rows at a time."""
    name = path.name.lower()
    if not name.removesuffix(".gz").endswith(".json"):
        return True
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        first = file.readline(_PEEKED_BYTES)
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict) and first.endswith(b"\n")
    except (ValueError, RecursionError):
        return False


def _record_chunks(
    records: Iterable[tuple[int, dict[str, Any]]], choose: Choice
) -> Iterator[RawRows]:
    """Yield records as `files.from_records` collects them."""
    numbered = iter(records)
    first = list(islice(numbered, PEEKED_RECORDS))
    available = dict.fromkeys(key for _, record in first for key in record)
    names = choose(tuple(available))
    numbered = chain(first, numbered)
    while some := list(islice(numbered, CHUNK_ROWS)):
        for _, record in some:
            available.update(dict.fromkeys(record))
        yield RawRows(
            {name: [record.get(name) for _, record in some] for name in names},
            tuple(available),
            [place for place, _ in some],
            "line",
        )
