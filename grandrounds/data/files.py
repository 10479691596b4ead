"""Reads local files of rows: JSON, JSON Lines, CSV and TSV, gzipped or not, and Parquet."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal, cast

from grandrounds.data.paragraphs import paragraphs
from grandrounds.errors import DataError, first_line

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

_CSV_BLOCK_BYTES = 1 << 26  # pyarrow refuses a CSV row longer than one block


Choice = Callable[[Sequence[str]], Sequence[str]]
"""From the columns of a source to those that are read."""

PEEKED_RECORDS = 100
"""Objects of a JSON file whose keys are its columns when it is chosen which to read."""


@dataclass(frozen=True)
class RawRows:
    """The content of a source before its values are checked."""

    values: dict[str, list[Any]]
    """The requested columns that exist."""
    available: tuple[str, ...]
    """All columns of the source."""
    places: Sequence[int]
    """Position of each row in its file, from 1."""
    unit: str
    """What `places` counts: `line` or `row`."""
    files: Sequence[tuple[str, int]] = ()
    """Name and number of rows of each file, where there are several."""

    def where(self, row: int) -> str:
        """Return the place of a row, counted from 0, in words."""
        place = f"{self.unit} {self.places[row]}"
        for name, count in self.files:
            if row < count:
                return f"{name}, {place}"
            row -= count
        return place


class WrittenFloat(float):
    """A number of a JSON file with its text: 1.10 and 1.1 are different labels."""

    def __new__(cls, text: str) -> WrittenFloat:
        """Return the number that a text means."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str
    """The number as it is written."""


_DECODER = json.JSONDecoder(parse_float=WrittenFloat)


def from_records(
    records: Iterable[tuple[int, dict[str, Any]]], choose: Choice, unit: str
) -> RawRows:
    """Collect the chosen columns of records; a key missing from a record is a missing value."""
    numbered = iter(records)
    first = list(islice(numbered, PEEKED_RECORDS))
    available = dict.fromkeys(key for _, record in first for key in record)
    values: dict[str, list[Any]] = {name: [] for name in choose(tuple(available))}
    places = []
    for place, record in chain(first, numbered):
        places.append(place)
        available.update(dict.fromkeys(record))
        for name, column in values.items():
            column.append(record.get(name))
    present = {name: column for name, column in values.items() if name in available}
    return RawRows(present, tuple(available), places, unit)


def read_file(path: Path, source: str, choose: Choice, labels: Sequence[str] = ()) -> RawRows:
    """Return the chosen columns of a file, whose format follows from its name.

    Parameters
    ----------
    labels
        Columns that hold labels, not text: in a CSV file they are integers if every cell is one as
        Python writes it, else text, so that 1.1 and 1.10, or 01 and 001, stay different.

    Raises
    ------
    DataError
        If the file, a line or a row is malformed; the message calls the file `source`.
    OSError, EOFError, UnicodeDecodeError, zlib.error
        If the file is damaged or cannot be read.
    """
    name = path.name.lower()
    with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
        if name.endswith(".parquet"):
            return _read_parquet(cast(IO[bytes], file), source, choose)
        ending = Path(name.removesuffix(".gz")).suffix
        if ending in SEPARATORS:
            return _read_csv(cast(IO[bytes], file), source, choose, SEPARATORS[ending], labels)
        if ending == ".json":
            records, unit = json_records(file.read(), source)
            return from_records(records, choose, unit)
        if ending == ".txt":
            return from_records(paragraphs(file), choose, "line")
        return from_records(json_lines(file, source), choose, "line")


def check_same_columns(of_files: Mapping[str, Sequence[str]], wanted: Iterable[str]) -> None:
    """Raise `DataError` if a file lacks a column that is read of the first one.

    Parameters
    ----------
    of_files
        Name of a file → its columns.
    """
    first = next(iter(of_files))
    for name, available in of_files.items():
        if missing := sorted(set(wanted) - set(available)):
            if not available:
                raise DataError(f"{name}: it has no rows, or empty ones. Remove it.")
            raise DataError(
                f"{name}: there is no column {missing[0]!r}, which {first} has; the columns "
                f"are: {', '.join(available)}. The files of a source need the same columns."
            )


def json_records(
    content: bytes, source: str
) -> tuple[Iterable[tuple[int, dict[str, Any]]], Literal["line", "row"]]:
    """Return numbered objects, and whether the numbers count lines or the rows of one array."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    items = _array(content, source) if content.lstrip().startswith(b"[") else _wrapped(content)
    if items is None:
        return json_lines(io.BytesIO(content), source), "line"
    for number, item in enumerate(items, 1):
        _check_object(item, f"{source}, row {number}")
    return enumerate(items, 1), "row"


def _array(content: bytes, source: str) -> list[Any]:
    """Return the rows of a file that is one array."""
    try:
        rows: list[Any] = json.loads(content, parse_float=WrittenFloat)
    except json.JSONDecodeError as error:
        line = content.decode().split("\n")[error.lineno - 1]
        raise _no_json(source, error.lineno, error.msg, line) from error
    except UnicodeDecodeError as error:
        raise _no_json(source, content.count(b"\n", 0, error.start) + 1, "not UTF-8") from error
    except (RecursionError, ValueError) as error:
        raise _no_json(source, 1, _limit(error)) from error
    return rows


def _wrapped(content: bytes) -> list[Any] | None:
    """Return the rows of a file that is one object with an array `data`; None if it is not."""
    try:
        whole = json.loads(content, parse_float=WrittenFloat)
    except (ValueError, RecursionError):
        return None  # one object per line, or damaged: told with its line
    rows = whole.get("data") if isinstance(whole, dict) else None
    return rows if isinstance(rows, list) else None


def json_lines(file: Iterable[bytes], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each non-blank line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            record = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise _no_json(source, number, error.msg, line.decode()) from error
        except UnicodeDecodeError as error:
            raise _no_json(source, number, "not UTF-8") from error
        except (RecursionError, ValueError) as error:
            raise _no_json(source, number, _limit(error)) from error
        _check_object(record, f"{source}, line {number}")
        yield number, record


def _limit(error: Exception) -> str:
    """Return which limit of Python's parser valid JSON exceeds."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _no_json(source: str, line_number: int, fault: str, line: str = "") -> DataError:
    """Return the error for a line that cannot be parsed; it quotes the start of the line."""
    begins = f"; the line begins {line.strip()[:40]!r}" if line else ""
    return DataError(
        f"{source}, line {line_number}: not valid JSON ({fault}){begins}. A file holds one object "
        "per line, or (.json only) one array of objects, by itself or under `data`. Correct or "
        "remove the line."
    )


def _check_object(record: Any, where: str) -> None:
    """Raise `DataError` for a JSON value without columns."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: {json.dumps(record)[:40]} is not a JSON object; every row must be one, such "
            'as {"input": "...", "output": "..."}. Correct or remove it (an array of objects needs '
            "a file name that ends in .json)."
        )


SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Ending of a file of separated values → its separator."""


def _read_csv(
    file: IO[bytes], source: str, choose: Choice, separator: str, labels: Sequence[str]
) -> RawRows:
    """Read separated values with a header line; quoted values may contain line breaks."""
    from pyarrow import csv  # type: ignore[import-untyped]

    with _valid_csv(source, separator):
        columns, how = _csv_options(file, choose, separator)
        table = csv.read_csv(file, *how)
    raw = from_table(table, columns, tuple(table.column_names))
    read = {name: csv_labels(raw.values[name]) for name in labels if name in raw.values}
    return replace(raw, values={**raw.values, **read})


def csv_batches(
    file: IO[bytes], source: str, choose: Choice, separator: str, rows: int
) -> Iterator[RawRows]:
    """Yield the chosen columns of separated values as text, at most `rows` rows each time."""
    from pyarrow import csv

    with _valid_csv(source, separator):
        columns, (read_by, parsed_as, convert) = _csv_options(file, choose, separator)
        available = tuple(_csv_names(file, read_by, parsed_as))
        convert.include_columns = [c for c in columns if available.count(c) == 1] or [available[0]]
        reader = csv.open_csv(file, read_by, parsed_as, convert)
        yield from table_chunks(reader, convert.include_columns, available, rows)


@contextmanager
def _valid_csv(source: str, separator: str) -> Iterator[None]:
    """Report what pyarrow cannot parse as an error of the file."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        kind = "CSV" if separator == "," else "TSV"
        raise DataError(
            f"{source}: not valid {kind} ({first_line(error)}). The first line must name the "
            "columns and every row must have as many values, in UTF-8. Correct the file."
        ) from error


def _csv_options(
    file: IO[bytes], choose: Choice, separator: str
) -> tuple[Sequence[str], tuple[Any, Any, Any]]:
    """Return the chosen columns, and pyarrow's options to read them as text."""
    import pyarrow
    from pyarrow import csv

    parsed_as = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    # With threads pyarrow's messages have no row number.
    read_by = csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES)
    columns = choose(tuple(_csv_names(file, read_by, parsed_as)))
    types = dict.fromkeys(columns, pyarrow.string())
    return columns, (read_by, parsed_as, csv.ConvertOptions(column_types=types))


def _csv_names(file: IO[bytes], read_by: Any, parsed_as: Any) -> list[str]:
    """Return the names in the header; the file is at its beginning before and after."""
    from pyarrow import csv

    header = file.readline()
    while header.count(b'"') % 2 and (more := file.readline()):
        header += more  # a quoted name may contain line breaks
    file.seek(0)
    names: list[str] = csv.read_csv(io.BytesIO(header), read_by, parsed_as).column_names
    return names


def csv_labels(cells: list[str]) -> list[Any]:
    """Return labels as integers if all are, else as text; an empty cell is a missing value."""
    labels = [cell if cell.strip() else None for cell in cells]
    if all(label is None or _INTEGER.fullmatch(label) for label in labels):
        return [None if label is None else int(label) for label in labels]
    return labels


def _read_parquet(file: IO[bytes], source: str, choose: Choice) -> RawRows:
    """Read the chosen columns of a Parquet file."""
    with _valid_parquet(source):
        opened, columns, available = _opened_parquet(file, choose)
        table = opened.read(columns=[name for name in available if name in columns])
    return from_table(table, columns, available)


def parquet_batches(file: IO[bytes], source: str, choose: Choice, rows: int) -> Iterator[RawRows]:
    """Yield the chosen columns of a Parquet file, at most `rows` rows each time."""
    with _valid_parquet(source):
        opened, columns, available = _opened_parquet(file, choose)
        read = [name for name in available if name in columns]
        batches = opened.iter_batches(rows, columns=read, use_threads=False)
        yield from table_chunks(batches, columns, available, rows)


@contextmanager
def _valid_parquet(source: str) -> Iterator[None]:
    """Report what pyarrow cannot read as an error of the file."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{source}: not a valid Parquet file ({first_line(error)}). Copy or download it again."
        ) from error


def _opened_parquet(file: IO[bytes], choose: Choice) -> tuple[Any, Sequence[str], tuple[str, ...]]:
    """Return an open Parquet file, the chosen columns, and those that there are."""
    from pyarrow import parquet

    opened = parquet.ParquetFile(file)
    available = tuple(opened.schema_arrow.names)
    return opened, choose(available), available


def from_table(
    table: Any, columns: Sequence[str], available: tuple[str, ...], first: int = 1
) -> RawRows:
    """Collect the requested columns of a `pyarrow.Table` whose first row has this number."""
    once = [name for name in columns if available.count(name) == 1]
    values = {name: table.select([name]).to_pydict()[name] for name in once}
    return RawRows(values, available, range(first, first + table.num_rows), "row")


def table_chunks(
    tables: Iterable[Any], columns: Sequence[str], available: tuple[str, ...], rows: int
) -> Iterator[RawRows]:
    """Yield tables or batches of pyarrow that follow one another, at most `rows` rows each time."""
    first = 1
    for table in tables:
        for start in range(0, table.num_rows, rows):
            part = table.slice(start, rows)
            yield from_table(part, columns, available, first)
            first += part.num_rows
