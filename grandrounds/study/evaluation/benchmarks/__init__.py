"""The benchmarks: multiple-choice questions with one right answer, from a file or from the hub.

One benchmark is one module of this package that defines `BENCHMARK`; the module's name is the
benchmark's. `benchmarks` imports every module it finds here, so that another benchmark is another
file and no edit elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pkgutil
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from grandrounds.data.files import json_records
from grandrounds.data.sources import silent_downloads
from grandrounds.errors import ConfigError, DataError, nearest

LETTERS = ("A", "B", "C", "D")
"""The labels of four options."""

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""What follows a benchmark's file stem in a data folder. Columns are the hub's own."""


@dataclass(frozen=True)
class Item:
    """One question with its options."""

    row: int
    """Its row in the source, from 1."""
    question: str
    """What is asked."""
    context: tuple[str, ...]
    """The paragraphs to be read before; empty where the benchmark has none."""
    options: tuple[str, ...]
    """What each option says. Two may say the same."""
    labels: tuple[str, ...]
    """What each option is called: `A`, `B`, ... or `yes`, `no`, `maybe`."""
    gold_index: int
    """Position of the right option, from 0."""
    group: str
    """The part of the benchmark that it belongs to; empty where there are no parts."""


@dataclass(frozen=True)
class Row:
    """One row of a source; its methods return a column's value, or refuse it by name."""

    number: int
    """From 1, in the source's order."""
    place: str
    """Source and line or row, as an error names it."""
    values: dict[str, Any]
    """Column → value."""

    def value(self, column: str) -> Any:
        """Return what stands in a column that must be there."""
        if column not in self.values:
            there = ", ".join(self.values)
            raise DataError(
                f"{self.place}: there is no column {column!r}; the columns are: {there}."
                f"{nearest(column, self.values)} Give the benchmark in the hub's own columns."
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a text."""
        value = self.value(column)
        if not _is_text(value):
            raise self.refused(column, "text")
        return str(value)

    def texts(self, column: str) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self.value(column)
        if not isinstance(values, list | tuple) or not all(_is_text(value) for value in values):
            raise self.refused(column, "a list of texts")
        return tuple(values)

    def position(self, column: str, allowed: Sequence[int | str]) -> int:
        """Return where the value stands among those allowed; a number may be written as text."""
        value = self.value(column)
        written = [str(other) for other in allowed]
        if isinstance(value, bool) or str(value) not in written:
            raise self.refused(column, "one of " + ", ".join(written))
        return written.index(str(value))

    def refused(self, column: str, allowed: str) -> DataError:
        """Return the error for a value that cannot be."""
        shown = repr(self.values[column])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return DataError(
            f"{self.place}, column {column!r}: the value is {shown}; allowed is {allowed}. "
            "Correct or remove the row."
        )


def _is_text(value: Any) -> bool:
    """Say whether a value is a text that can be encoded: no half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows come from, and how one is read."""

    name: str
    """What it is called on the command line and in result files: the name of its module."""
    title: str
    """What it is called in a table."""
    expected_items: int
    """Items that it has as published."""
    labels: tuple[str, ...]
    """The labels of every item's options."""
    instruction: str
    """What protocol `flowertune` says before a question."""
    read: Callable[[Row], Item]
    """Turns a row in the hub's own columns into an item."""
    stem: str
    """The name of its file in a data folder, without one of `FILE_ENDINGS`."""
    hub_name: str | None
    """The data set on the hub; None if the rows are built in."""
    hub_config: str | None
    """The data set's configuration."""
    hub_split: str
    """The split that is asked."""
    hub_revision: str | None
    """`refs/convert/parquet` for data sets that otherwise come with a loading script."""
    built_in: Callable[[], list[dict[str, Any]]] | None
    """Makes the rows, for a benchmark that needs neither file nor hub."""


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark by name, in alphabetical order."""
    modules = [
        import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    return {module.BENCHMARK.name: module.BENCHMARK for module in modules}


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises
    ------
    ConfigError
        If there is none; the message suggests the nearest.
    """
    known = benchmarks()
    if name not in known:
        raise ConfigError(
            f"unknown benchmark {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]


def load_items(
    benchmark: Benchmark, data_dir: Path | None = None, limit: int | None = None
) -> tuple[Item, ...]:
    """Return the benchmark's items in the source's order.

    Parameters
    ----------
    benchmark : Benchmark
        From `get_benchmark`.
    data_dir : Path, optional
        Folder with the benchmark's file, in the hub's own columns. Where it holds none, and
        without a folder, the rows come from the hub; `source_of` says which it was.
    limit : int, optional
        Take only so many rows, the first; at least 1.

    Raises
    ------
    ConfigError
        If `limit` is below 1.
    DataError
        If the source cannot be found or read or has no rows, or if a row lacks a column or holds a
        value that cannot be.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}; leave it out to ask every item")
    file = _local_file(benchmark, data_dir)
    if benchmark.built_in is not None:
        places, rows = f"{benchmark.name}, row", list(enumerate(benchmark.built_in(), 1))
    elif file is not None:
        places, rows = _file_rows(file)
    else:
        places = f"{benchmark.hub_name} (hub), row"
        rows = list(enumerate(_hub_rows(benchmark, data_dir).to_list(), 1))
    if not rows:
        raise DataError(f"{file or benchmark.hub_name}: there are no rows. Give another source.")
    return tuple(
        benchmark.read(Row(number, f"{places} {place}", values))
        for number, (place, values) in enumerate(rows[:limit], 1)
    )


def source_of(benchmark: Benchmark, data_dir: Path | None = None) -> dict[str, str]:
    """Return where `load_items` reads, so that others can check that they read the same.

    Returns
    -------
    dict
        `file` and `sha256` of the file's bytes; or `hub`, `config`, `split`, `revision` (a commit
        where the hub's cache tells it, the branch otherwise) and `rows-sha256`; or `built-in` and
        `rows-sha256`.
    """
    file = _local_file(benchmark, data_dir)
    if benchmark.built_in is not None:
        return {"built-in": benchmark.name, "rows-sha256": _rows_hash(benchmark.built_in())}
    if file is not None:
        return {"file": file.name, "sha256": hashlib.sha256(_file_bytes(file)).hexdigest()}
    loaded = _hub_rows(benchmark, data_dir)
    urls = " ".join(loaded.info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", urls)
    return {
        "hub": str(benchmark.hub_name),
        "config": benchmark.hub_config or "default",
        "split": benchmark.hub_split,
        "revision": commit[1] if commit else benchmark.hub_revision or "main",
        "rows-sha256": _rows_hash(loaded.to_list()),
    }


def _rows_hash(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


# --- Files ----------------------------------------------------------------------------------------


def _local_file(benchmark: Benchmark, data_dir: Path | None) -> Path | None:
    """Return the benchmark's file in a data folder, if there is one."""
    if data_dir is None or benchmark.built_in is not None:
        return None
    if not data_dir.is_dir():
        raise DataError(
            f"{data_dir}: no such folder; it must hold a file for each benchmark, such as "
            f"{benchmark.stem}{FILE_ENDINGS[0]}"
        )
    found = [path for end in FILE_ENDINGS if (path := data_dir / f"{benchmark.stem}{end}").exists()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{data_dir}: {names} are one benchmark in several files; keep one of them")
    return found[0] if found else None


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror})") from error


def _file_rows(path: Path) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """Return how a row's place is called, and place and values of each row."""
    content = _file_bytes(path)
    if path.name.endswith(".parquet"):
        return f"{path}, row", list(enumerate(_parquet_rows(content, path), 1))
    if path.name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: the file is damaged ({error}). Copy it again.") from error
    records, unit = json_records(content, str(path))
    return f"{path}, {unit}", list(records)


def _parquet_rows(content: bytes, path: Path) -> Iterable[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a valid Parquet file ({_first_line(error)})") from error
    return rows


# --- The hub --------------------------------------------------------------------------------------


def _hub_rows(benchmark: Benchmark, data_dir: Path | None) -> Any:
    """Return the `datasets.Dataset` of a benchmark; a second call reads the library's cache."""
    import datasets

    name, config, split = benchmark.hub_name, benchmark.hub_config, benchmark.hub_split
    try:
        with silent_downloads():
            if benchmark.hub_revision is None:
                return datasets.load_dataset(name, config, split=split)
            files = f"hf://datasets/{name}@{benchmark.hub_revision}/{config}/{split}/*.parquet"
            return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # hub, HTTP and builders raise unrelated types; none is swallowed
        endings = ", ".join(FILE_ENDINGS)
        here = f"; {data_dir} holds no file of it either" if data_dir else ""
        raise DataError(
            f"benchmark {benchmark.name!r} could not be loaded from the Hugging Face hub "
            f"({name}: {_first_line(error)}){here}. Check the network and HF_HUB_OFFLINE, or give "
            f"--data DIR, a folder with {benchmark.stem} as one of: {endings}."
        ) from error


def _first_line(error: BaseException) -> str:
    """Return the first line of a library's message, cut to a length that can be read."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
