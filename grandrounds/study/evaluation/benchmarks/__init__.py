"""Multiple-choice benchmarks with one correct answer per item, read from a file or from the hub.

Each benchmark is one module of this package that defines `BENCHMARK` and carries its name.
`benchmarks` imports every module it finds here, so adding a benchmark takes one file and no edit
elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pkgutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from grandrounds.data.conversations import Turn
from grandrounds.data.files import json_records
from grandrounds.data.sources import hub_commit, silent_downloads
from grandrounds.errors import ConfigError, DataError, first_line, nearest
from grandrounds.study.evaluation.sample import stratified_sample

MEDICAL = ("pubmedqa", "medqa", "medmcqa", "careqa")
"""The benchmarks of FlowerTune's medical leaderboard."""

LETTERS = ("A", "B", "C", "D")
"""Labels of four options."""

HELD_OUT = "held-out"
"""Name of a run's own held-out rows among the benchmarks, and in result files."""

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Endings of a benchmark's file in a data folder. Columns are those of the hub's data set."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question with its options."""

    row: int
    """Row in the source, from 1."""
    question: str
    """Text of the question."""
    context: tuple[str, ...] = ()
    """Paragraphs of the abstract that precedes the question."""
    options: tuple[str, ...]
    """Text of each option. Two options may have the same text."""
    labels: tuple[str, ...] = LETTERS
    """Label of each option: `A`, `B`, ... or `yes`, `no`, `maybe`."""
    gold_index: int
    """Position of the correct option, from 0."""
    group: str = ""
    """Subset of the benchmark that the item belongs to; empty if it has no subsets."""
    before: tuple[Turn, ...] = ()
    """What was said before a run's held-out question."""
    parts: tuple[str, str] | None = None
    """Instruction and input of a run's held-out question, where it is both."""


@dataclass(frozen=True)
class Row:
    """One row of a source; its methods return a checked value, or raise an error that names it."""

    number: int
    """Position in the source, from 1."""
    place: str
    """Source and line or row, as quoted in errors."""
    values: dict[str, Any]
    """Column → value."""

    def value(self, column: str) -> Any:
        """Return the value of a required column."""
        if column not in self.values:
            there = ", ".join(self.values)
            raise DataError(
                f"{self.place}: there is no column {column!r}; the columns are: {there}."
                f"{nearest(column, self.values)} Use the column names of the hub's data set."
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a string."""
        value = self.value(column)
        if not _is_text(value):
            raise self.refused(column, "a string")
        return str(value)

    def texts(self, column: str) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self.value(column)
        if not isinstance(values, list | tuple) or not all(_is_text(value) for value in values):
            raise self.refused(column, "a list of strings")
        return tuple(values)

    def inner(self, column: str) -> Row:
        """Return an object as a row of its own."""
        values = self.value(column)
        if not isinstance(values, dict):
            raise self.refused(column, "an object")
        return Row(self.number, f"{self.place}, column {column!r}", values)

    def position(self, column: str, allowed: Sequence[int | str]) -> int:
        """Return the index of the value among those allowed; numbers may be strings."""
        value = self.value(column)
        written = [str(other) for other in allowed]
        if isinstance(value, bool) or str(value) not in written:
            raise self.refused(column, "one of " + ", ".join(written))
        return written.index(str(value))

    def refused(self, column: str, allowed: str) -> DataError:
        """Return the error for an invalid value."""
        shown = repr(self.values[column])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return DataError(
            f"{self.place}, column {column!r}: the value is {shown}; allowed is {allowed}. "
            "Correct or remove the row."
        )


def _is_text(value: Any) -> bool:
    """Return whether a value is a string without lone surrogates, which UTF-8 cannot encode."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where a benchmark's rows come from, and how a row is read."""

    name: str
    """Name on the command line, in result files and of a data folder's file: its module's."""
    title: str
    """Name in tables."""
    expected_items: int
    """Number of items as published, or of the user's source."""
    labels: tuple[str, ...] = LETTERS
    """Labels of every item's options."""
    instruction: str
    """Instruction that precedes each question under protocol `flowertune`."""
    read: Callable[[Row], Item] | None = None
    """Turns a row with the hub's columns into an item; None if the items are the user's own."""
    hub_name: str | None = None
    """Data set on the hub; None if the rows are built in."""
    hub_config: str | None = None
    """Configuration of the data set."""
    hub_split: str = "test"
    """Split of the data set."""
    hub_revision: str | None = None
    """`refs/convert/parquet` for data sets that are otherwise published as a loading script."""
    built_in: Callable[[], list[dict[str, Any]]] | None = None
    """Generates the rows of a benchmark that needs neither file nor hub."""
    whole_options: bool = False
    """Whether the question stands in the run's own prompt, and whole options are its answers."""
    own: bool = False
    """Whether the items are the user's, so that nothing is published about them."""
    is_open: bool = False
    """Whether the model writes its answer; an item's only option is the reference answer."""


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name, in alphabetical order."""
    modules = [
        import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    return {module.BENCHMARK.name: module.BENCHMARK for module in modules}


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name; raise `ConfigError` if there is none."""
    known = benchmarks()
    if name not in known:
        raise ConfigError(
            f"unknown benchmark {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]


def check_names(names: Iterable[str]) -> list[str]:
    """Return names of benchmarks or `held-out`; raise `ConfigError` for one that is unknown."""
    return [name if name == HELD_OUT else get_benchmark(name).name for name in names]


def held_out_benchmark(count: int) -> Benchmark:
    """Return the held-out rows of a run as a benchmark of `count` items."""
    return Benchmark(
        name=HELD_OUT,
        title="Held-out rows",
        expected_items=count,
        labels=("answer",),
        instruction="",
        whole_options=True,
        own=True,
        is_open=True,
    )


def placeholder_item(benchmark: Benchmark, question: str = "\x00question\x00") -> Item:
    """Return an item of placeholders: its prompt shows what all prompts of a benchmark share."""
    return Item(
        row=1,
        question=question,
        context=("\x00one\x00", "\x00two\x00"),
        options=tuple(f"\x00option {label}\x00" for label in benchmark.labels),
        labels=benchmark.labels,
        gold_index=0,
    )


# --- Items ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A benchmark and the items read from it."""

    benchmark: Benchmark
    items: tuple[Item, ...]
    """In the source's order."""
    source: dict[str, str]
    """Where the items were read, from `source_of`."""


@dataclass(frozen=True)
class Questions:
    """The items of one or more benchmarks."""

    tasks: tuple[Task, ...]
    """One per benchmark."""
    limit: int | None
    """Maximum number of items per benchmark; None for all."""


def load_questions(
    names: Iterable[str], data: Path | None = None, limit: int | None = None
) -> Questions:
    """Read the items of several benchmarks; parameters and errors are those of `load_items`."""
    known = [get_benchmark(name) for name in dict.fromkeys(names)]
    tasks = (Task(b, load_items(b, data, limit), source_of(b, data)) for b in known)
    return Questions(tuple(tasks), limit)


def load_items(
    benchmark: Benchmark, data: Path | None = None, limit: int | None = None
) -> tuple[Item, ...]:
    """Return a benchmark's items in the source's order.

    Parameters
    ----------
    data : Path, optional
        Folder with the benchmark's file. Without a folder, or if the folder has no such file, the
        rows are loaded from the hub.
    limit : int, optional
        Maximum number of items, at least 1: a seeded sample, stratified by answer. The rows beyond
        are checked too.

    Raises
    ------
    ConfigError
        If `limit` is below 1.
    DataError
        If the source cannot be read or has no rows, or if a row has a missing column or an invalid
        value.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}; omit it to use every item")
    file = local_file(benchmark, data)
    if benchmark.built_in is not None:
        places, rows = f"{benchmark.name}, row", list(enumerate(benchmark.built_in(), 1))
    elif file is not None:
        places, rows = _file_rows(file)
    else:
        places = f"{benchmark.hub_name} (hub), row"
        rows = list(enumerate(_hub_rows(benchmark, data).to_list(), 1))
    if not rows:
        raise DataError(f"{file or benchmark.hub_name}: there are no rows. Use another source.")
    read = benchmark.read
    if read is None:
        raise ConfigError(f"{benchmark.name} is an exam of your own: give its file as --benchmark.")
    items = tuple(
        read(Row(number, f"{places} {place}", values))
        for number, (place, values) in enumerate(rows, 1)
    )
    return sampled(items, limit)


def sampled(items: tuple[Item, ...], limit: int | None) -> tuple[Item, ...]:
    """Return at most `limit` items in their order, each answer of each group represented."""
    if limit is None:
        return items
    strata = [(item.group, item.gold_index) for item in items]
    return tuple(items[i] for i in stratified_sample(strata, limit))


def source_of(benchmark: Benchmark, data: Path | None = None) -> dict[str, str]:
    """Return the provenance of a benchmark's rows, which a second party can check.

    Returns
    -------
    dict
        `file` and `sha256` of the file's bytes; or `hub`, `config`, `split`, `revision` (a commit
        if the hub's cache records it, else the branch) and `rows-sha256`; or `built-in` and
        `rows-sha256`.
    """
    file = local_file(benchmark, data)
    if benchmark.built_in is not None:
        return {"built-in": benchmark.name, "rows-sha256": _rows_hash(benchmark.built_in())}
    if file is not None:
        return {"file": file.name, "sha256": hashlib.sha256(_file_bytes(file)).hexdigest()}
    loaded = _hub_rows(benchmark, data)
    return {
        "hub": str(benchmark.hub_name),
        "config": benchmark.hub_config or "default",
        "split": benchmark.hub_split,
        "revision": hub_commit(loaded) or benchmark.hub_revision or "main",
        "rows-sha256": _rows_hash(loaded.to_list()),
    }


def _rows_hash(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


# --- Files ----------------------------------------------------------------------------------------


def local_file(benchmark: Benchmark, data: Path | None) -> Path | None:
    """Return the benchmark's file in a data folder, if it exists."""
    if data is None or benchmark.built_in is not None:
        return None
    if not data.is_dir():
        raise DataError(
            f"{data}: no such folder; it must contain one file per benchmark, such as "
            f"{benchmark.name}{FILE_ENDINGS[0]}"
        )
    found = [path for end in FILE_ENDINGS if (path := data / f"{benchmark.name}{end}").exists()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{data}: {names} are files of the same benchmark; keep one of them")
    return found[0] if found else None


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror})") from error


def _file_rows(path: Path) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """Return the prefix of a row's place in errors, then each row's place and values."""
    content = _file_bytes(path)
    if path.name.endswith(".parquet"):
        return f"{path}, row", list(enumerate(_parquet_rows(content, path), 1))
    if path.name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: the file is damaged ({first_line(error)}). Copy it again."
            ) from error
    records, unit = json_records(content, str(path))
    return f"{path}, {unit}", list(records)


def _parquet_rows(content: bytes, path: Path) -> Iterable[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a valid Parquet file ({first_line(error)})") from error
    return rows


# --- The hub --------------------------------------------------------------------------------------


def _hub_rows(benchmark: Benchmark, data: Path | None) -> Any:
    """Return the benchmark's `datasets.Dataset`; later calls read the library's cache."""
    import datasets

    name, config, split = benchmark.hub_name, benchmark.hub_config, benchmark.hub_split
    try:
        with silent_downloads():
            if benchmark.hub_revision is None:
                return datasets.load_dataset(name, config, split=split)
            files = f"hf://datasets/{name}@{benchmark.hub_revision}/{config}/{split}/*.parquet"
            return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # hub, HTTP and builders raise unrelated types; all are reported
        endings = ", ".join(FILE_ENDINGS)
        here = f"; {data} has no file of it either" if data else ""
        raise DataError(
            f"benchmark {benchmark.name!r} could not be loaded from the Hugging Face hub "
            f"({name}: {first_line(error)}){here}. Check the network and HF_HUB_OFFLINE, or use "
            f"--data DIR, a folder with {benchmark.name} as one of: {endings}."
        ) from error
