"""Reads local files of rows: JSON, JSON Lines and CSV, gzipped or not, and Parquet."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

from grandrounds.errors import DataError, first_line

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

_CSV_BLOCK_BYTES = 1 << 26  # pyarrow refuses a CSV row longer than one block


@dataclass(frozen=True)
class RawRows:
    """The content of a source before its values are checked."""

    values: dict[str, list[Any]]
    """The requested columns that exist."""
    available: tuple[str, ...]
    """All columns of the source."""
    places: Sequence[int]
    """Position of each row, from 1."""
    unit: str
    """What `places` counts: `line` or `row`."""


class WrittenFloat(float):
    """A number of a JSON file with its text: 1.10 and 1.1 are different labels."""

    def __new__(cls, text: str) -> WrittenFloat:
        """Return the number that a text means."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str
    """The number as it is written."""


def from_records(
    records: Iterable[tuple[int, dict[str, Any]]], columns: Sequence[str], unit: str
) -> RawRows:
    """Collect the requested columns of records; a key missing from a record is a missing value."""
    values: dict[str, list[Any]] = {name: [] for name in columns}
    available: dict[str, None] = {}
    places = []
    for place, record in records:
        places.append(place)
        available.update(dict.fromkeys(record))
        for name, column in values.items():
            column.append(record.get(name))
    present = {name: column for name, column in values.items() if name in available}
    return RawRows(present, tuple(available), places, unit)


def read_file(path: Path, source: str, columns: Sequence[str], texts: int = 2) -> RawRows:
    """Return the requested columns of a file, whose format follows from its name.

    Parameters
    ----------
    texts : int
        Number of columns, from the first, that hold text. The others hold labels: in a CSV file
        they are integers if every cell is one as Python writes it, else text, so that 1.1 and
        1.10, or 01 and 001, stay different.

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
            return _read_parquet(cast(IO[bytes], file), source, columns)
        if name.removesuffix(".gz").endswith(".csv"):
            return _read_csv(cast(IO[bytes], file), source, columns, texts)
        if name.removesuffix(".gz").endswith(".json"):
            records, unit = json_records(file.read(), source)
            return from_records(records, columns, unit)
        return from_records(_json_lines(file, source), columns, "line")


def json_records(
    content: bytes, source: str
) -> tuple[Iterable[tuple[int, dict[str, Any]]], Literal["line", "row"]]:
    """Return numbered objects, and whether the numbers count lines or the rows of one array."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        return _json_lines(io.BytesIO(content), source), "line"
    try:
        items = json.loads(content, parse_float=WrittenFloat)
    except json.JSONDecodeError as error:
        line = content.decode().split("\n")[error.lineno - 1]
        raise _no_json(source, error.lineno, error.msg, line) from error
    except UnicodeDecodeError as error:
        raise _no_json(source, content.count(b"\n", 0, error.start) + 1, "not UTF-8") from error
    except RecursionError as error:
        raise _no_json(source, 1, "nested too deeply") from error
    for number, item in enumerate(items, 1):
        _check_object(item, f"{source}, row {number}")
    return enumerate(items, 1), "row"


def _json_lines(file: Iterable[bytes], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each non-blank line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            record = json.loads(text, parse_float=WrittenFloat)
        except json.JSONDecodeError as error:
            raise _no_json(source, number, error.msg, line.decode()) from error
        except UnicodeDecodeError as error:
            raise _no_json(source, number, "not UTF-8") from error
        except RecursionError as error:
            raise _no_json(source, number, "nested too deeply") from error
        _check_object(record, f"{source}, line {number}")
        yield number, record


def _no_json(source: str, line_number: int, fault: str, line: str = "") -> DataError:
    """Return the error for a line that cannot be parsed; it quotes the start of the line."""
    begins = f"; the line begins {line.strip()[:40]!r}" if line else ""
    return DataError(
        f"{source}, line {line_number}: not valid JSON ({fault}){begins}. A file holds one object "
        "per line, or (.json only) one array of objects. Correct or remove the line."
    )


def _check_object(record: Any, where: str) -> None:
    """Raise `DataError` for a JSON value without columns."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: {json.dumps(record)[:40]} is not a JSON object; every row must be one, such "
            'as {"input": "...", "output": "..."}. Correct or remove it (an array of objects needs '
            "a file name that ends in .json)."
        )


def _read_csv(file: IO[bytes], source: str, columns: Sequence[str], texts: int) -> RawRows:
    """Read comma-separated values with a header line; quoted values may contain line breaks."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import csv

    text = pyarrow.string()
    try:
        table = csv.read_csv(
            file,
            # With threads pyarrow's messages have no row number.
            read_options=csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, text)),
        )
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{source}: not valid CSV ({first_line(error)}). The first line must name the columns "
            "and every row must have as many values, in UTF-8. Correct the file."
        ) from error
    raw = from_table(table, columns, tuple(table.column_names))
    labels = {name: _csv_labels(raw.values[name]) for name in columns[texts:] if name in raw.values}
    return replace(raw, values={**raw.values, **labels})


def _csv_labels(cells: list[str]) -> list[Any]:
    """Return labels as integers if all are, else as text; an empty cell is a missing value."""
    labels = [cell if cell.strip() else None for cell in cells]
    if all(label is None or _INTEGER.fullmatch(label) for label in labels):
        return [None if label is None else int(label) for label in labels]
    return labels


def _read_parquet(file: IO[bytes], source: str, columns: Sequence[str]) -> RawRows:
    """Read the requested columns of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        available = opened.schema_arrow.names
        table = opened.read(columns=[name for name in available if name in columns])
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{source}: not a valid Parquet file ({first_line(error)}). Copy or download it again."
        ) from error
    return from_table(table, columns, tuple(available))


def from_table(table: Any, columns: Sequence[str], available: tuple[str, ...]) -> RawRows:
    """Collect the requested columns of a `pyarrow.Table`."""
    once = [name for name in columns if available.count(name) == 1]
    values = {name: table.select([name]).to_pydict()[name] for name in once}
    return RawRows(values, available, range(1, table.num_rows + 1), "row")
