"""Reads the rows of a data source: built-in data, a local file or a hub data set.

The result is always `Rows` in memory, in the source's order, with the question and the answer as
text and the columns needed for partitioning.
"""

from __future__ import annotations

import numbers
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.files import RawRows, WrittenFloat, from_records, from_table, read_file
from grandrounds.data.rows import Rows
from grandrounds.errors import DataError, first_line, nearest
from grandrounds.storage import found

FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
"""Supported file names. A `.json` file is an array of objects, or has one object per line."""

_SOURCE_KEY = "static.dataset.name"
_BUILT_IN = f"built-in data ({', '.join(EMBEDDED)})"
_CACHED_SOURCES = 4
_INT64_END = 1 << 63


def load_rows(
    source: str,
    *,
    question_column: str,
    answer_column: str,
    keep_columns: Sequence[str] = (),
) -> Rows:
    """Return the rows of a data source, with questions and answers as text.

    A source is read once per process: the same arguments return the same object until the file
    changes (path, modification time or length).

    Parameters
    ----------
    source : str
        One of `EMBEDDED`; a local file (any name that has one of `FILE_ENDINGS`, starts with `.`,
        `/` or `~`, or exists); otherwise the name of a hub data set, or `NAME@REVISION`, whose
        split `train` is read.
    question_column, answer_column : str
        Columns with the question and the answer. A missing value becomes an empty string and a
        number its text; any other type is an error. FlowerTune's medical app uses `input` as the
        question and `output` as the answer, and drops `instruction`, which is the same in all rows;
        one that differs is an error. `instruction,input` joins two columns by a space, as its
        finance and code apps do, unless there is a column of that name.
    keep_columns : sequence of str
        Further columns, such as the one that names the site. Integers stay integers, all else
        becomes text, and missing values, blank ones among them, stay missing. Labels of a CSV or
        JSON file are taken as they are written: 001 and 01, or 1.1 and 1.10, are different, and NA
        is one.

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
        path, version = existing_file(source)
        return _load_file(source, path, version, columns)
    return _load_hub(source, columns)


# --- Checks ---------------------------------------------------------------------------------------


def rows_of(raw: RawRows, source: str, columns: tuple[str, ...]) -> Rows:
    """Check that rows and columns exist, and convert their values to text."""
    return Rows(checked_values(raw, source, columns))


def checked_values(raw: RawRows, source: str, columns: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return the columns as `load_rows` describes them: two of text, then labels.

    Raises
    ------
    DataError
        If there are no rows, a column is missing, a value is not text, or a label is a number in
        one row and the same as text in another.
    """
    if not raw.places:
        raise DataError(
            f"{source}: the data source has no rows; at least one question with its answer is "
            f"needed. Choose another {_SOURCE_KEY}."
        )
    (question, answer), kept = columns[:2], columns[2:]
    parts = (question,) if question in raw.available else _named_in(question)
    keys = dict.fromkeys(parts or (question,), "data.question-column")
    keys |= {answer: "data.answer-column"} | dict.fromkeys(kept, "data.partition-by")
    _check_columns(raw.available, source, keys)
    _check_instructions(raw, source, columns)
    values: dict[str, list[Any]] = {question: _joined(raw, source, parts)}
    values[answer] = values[question] if answer == question else _texts(raw, source, answer)
    return values | {
        name: _labels(raw.values[name], f"{source}, column {name!r}")
        for name in kept
        if name not in (question, answer)
    }


INSTRUCTION = "instruction"
"""The column of Alpaca's format that FlowerTune's medical app drops."""


def columns_read(columns: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """Return the columns to read for those that are asked for, and how many of them hold text."""
    question, answer, *kept = columns
    instruction = (INSTRUCTION,) if question == "input" else ()
    texts = dict.fromkeys((question, *_named_in(question), answer, *instruction))
    return (*texts, *kept), len(texts)


def _named_in(columns: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in columns.split(",") if name.strip())


def _joined(raw: RawRows, source: str, parts: Sequence[str]) -> list[str]:
    """Return the text of one column, or of several joined by a space."""
    texts = [_texts(raw, source, part) for part in parts]
    if len(texts) == 1:
        return texts[0]
    return [" ".join(text for text in row if text.strip()) for row in zip(*texts, strict=True)]


def _check_instructions(raw: RawRows, source: str, columns: tuple[str, ...]) -> None:
    """Raise `DataError` if instructions that differ from row to row would be left out."""
    if columns[0] != "input" or INSTRUCTION in columns:
        return
    texts = raw.values.get(INSTRUCTION, [])
    different = {text.strip() for text in texts if isinstance(text, str) and text.strip()}
    if len(different) > 1:
        empty = sum(not str(text or "").strip() for text in raw.values["input"])
        raise DataError(
            f"{source}: the column {INSTRUCTION!r} has {len(different):,} different instructions, "
            f"which data.question-column = 'input' would leave out ({empty:,} of {len(texts):,} "
            "rows have no input). These are data of another task: write "
            f"data.question-column={INSTRUCTION},input for both columns, or "
            f"data.question-column={INSTRUCTION}."
        )


COLUMN_NAMES = {
    "data.question-column": ("question", "prompt", "instruction", "input", "query", "front", "q"),
    "data.answer-column": ("answer", "response", "completion", "output", "target", "back", "a"),
    "data.partition-by": ("site", "hospital", "ward", "client", "center", "centre", "department"),
}
"""Key of a column → what files usually call it, the likeliest first."""


def _check_columns(available: Sequence[str], source: str, wanted: Mapping[str, str]) -> None:
    """Raise one `DataError` for all columns that are missing or occur more than once.

    Parameters
    ----------
    wanted
        Column → key that names it.
    """
    faults, advice = [], []
    for name, key in wanted.items():
        count = available.count(name)
        if count == 1:
            continue
        fault = f"there are {count} columns named" if count else "there is no column"
        faults.append(f"{fault} {name!r}")
        advice.append(_column_advice(key, name, [one for one in available if one not in wanted]))
    if faults:
        raise DataError(
            f"{source}: {' and '.join(faults)}; the columns are: {', '.join(available)}."
            f"{''.join(advice)}"
        )


def _column_advice(key: str, name: str, available: Sequence[str]) -> str:
    """Return which column a key should name: the one of its meaning, else of nearly its name."""
    lower = {one.strip().lower(): one for one in reversed(available)}
    usual = next((lower[one] for one in COLUMN_NAMES[key] if one in lower), None)
    if not usual or nearest(name, available):
        return f"{nearest(name, available)} Set {key} to a column that occurs once."
    return f" Did you mean {usual!r}? Write {key}={usual}."


def _texts(raw: RawRows, source: str, name: str) -> list[str]:
    """Return a column as text; missing values become empty strings."""
    return [
        value
        if isinstance(value, str) and value.isascii()
        else _text(value, f"{source}, {raw.unit} {place}, column {name!r}")
        for value, place in zip(raw.values[name], raw.places, strict=True)
    ]


def _text(value: Any, where: str) -> str:
    """Return one value as text; `where` starts the message of an error."""
    if value is None or value != value:  # NaN is the only number that differs from itself
        return ""
    if isinstance(value, numbers.Number):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the value is of type {type(value).__name__}, but only text, numbers and "
            "missing values are supported. Choose other columns with data.question-column and "
            "data.answer-column, or convert these values to text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is an unpaired surrogate and not valid text. "
            "Remove it from the source."
        ) from error
    return value


def _labels(values: list[Any], where: str) -> list[Any]:
    """Return a further column as all integers or all text; missing values are None."""
    labels = [
        None
        if value is None or value != value or (isinstance(value, str) and not value.strip())
        else value
        for value in values
    ]
    if all(
        label is None or (type(label) is int and -_INT64_END <= label < _INT64_END)
        for label in labels
    ):
        return labels
    texts = [
        None if label is None else label.text if isinstance(label, WrittenFloat) else str(label)
        for label in labels
    ]
    is_text: dict[str, bool] = {}
    for label, text in zip(labels, texts, strict=True):
        if text is not None and is_text.setdefault(text, type(label) is str) != (
            type(label) is str
        ):
            raise DataError(
                f"{where}: {text} is text in one row and not in another, so that it is unclear "
                "whether both are the same. Write all of them as text, or none."
            )
    return texts


# --- Built-in data and the hub --------------------------------------------------------------------


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_embedded(source: str, columns: tuple[str, ...]) -> Rows:
    raw = from_records(enumerate(embedded_rows(source), 1), columns, "row")
    return rows_of(raw, source, columns)


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_hub(source: str, columns: tuple[str, ...]) -> Rows:
    import datasets

    name, _, revision = source.partition("@")
    at_revision = {"revision": revision} if revision else {}
    try:
        with silent_downloads():
            rows = datasets.load_dataset(name, split="train", **at_revision)
    except Exception as error:  # the hub, HTTP and builders raise unrelated types
        raise DataError(
            f"{_SOURCE_KEY} = {source!r} is neither {_BUILT_IN} nor a file that exists, and "
            f"could not be loaded from the Hugging Face hub ({first_line(error)})."
            f"{nearest(name, EMBEDDED)} Check the name, the network and HF_HUB_OFFLINE, or set "
            f"{_SOURCE_KEY} to a local file ({', '.join(FILE_ENDINGS)}) or to {_BUILT_IN}."
        ) from error
    table = rows.with_format("arrow")[:]
    read, _ = columns_read(columns)
    raw = from_table(table, read, tuple(rows.column_names))
    return Rows(checked_values(raw, source, columns), hub_commit(rows))


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


def looks_like_path(source: str) -> bool:
    """Whether a source is a local file, there or not, rather than a name on the hub."""
    return (
        source.startswith((".", "/", "~"))
        or source.lower().endswith(FILE_ENDINGS)
        or found(source) is not None
    )


def existing_file(source: str) -> tuple[Path, tuple[int, int]]:
    """Return the path and the version (modification time, length) of a supported file.

    Raises
    ------
    DataError
        If there is none, or it is not one that can be read.
    """
    allowed = ", ".join(FILE_ENDINGS)
    try:
        path = Path(source).expanduser().resolve()
        if path.is_dir():
            raise DataError(
                f"{source}: this is a folder; {_SOURCE_KEY} must name a file in it ({allowed})."
            )
        if not path.is_file():
            raise DataError(
                f"{source}: no such file.{_nearest_file(path)} Set {_SOURCE_KEY} to a file that "
                f"exists ({allowed}), to the name of a hub data set or to {_BUILT_IN}."
            )
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        raise unreadable(source, error) from error
    if not path.name.lower().endswith(FILE_ENDINGS):
        raise DataError(
            f"{source}: files ending in {path.suffix!r} cannot be read; allowed: {allowed}. "
            "Convert the file, or give it the ending of its format."
        )
    return path, (status.st_mtime_ns, status.st_size)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    return nearest(path.name, sorted(file.name for file in path.parent.iterdir()))


def unreadable(source: str, error: Exception) -> DataError:
    """Return the error for a file that is damaged or closed to this user."""
    return DataError(
        f"{source}: the file is damaged or cannot be read ({first_line(error)}). "
        "Copy or download it again, and check its name and permissions."
    )


@lru_cache(maxsize=_CACHED_SOURCES)
def _load_file(source: str, path: Path, version: tuple[int, int], columns: tuple[str, ...]) -> Rows:
    """Read one file; `version` is part of the cache key, so that a changed file is read again."""
    del version
    try:
        raw = read_file(path, source, *columns_read(columns))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise unreadable(source, error) from error
    return rows_of(raw, source, columns)
