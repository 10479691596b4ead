"""Sources whose rows are stored on the disk give what those in memory give, row for row."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from grandrounds.data import large, main_memory, sources, spool, streams
from grandrounds.data.examples import SiteData, split_rows
from grandrounds.data.on_demand import OnDemand
from grandrounds.data.own_prompt import columns_apart
from grandrounds.data.partitioning import PARTITIONERS, Division, Partition, partition_rows
from grandrounds.data.rows import Joined, Rows
from grandrounds.data.sources import load_rows
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.errors import DataError
from tests.places import ROOT

WARDS = ["2.10", "2.1", "02", "NA", "x"]
ROWS: list[dict[str, Any]] = [
    {
        "input": f"What helps patient {i % 50}? ü\n",
        "output": f"Rest {i % 60}.",
        "ward": WARDS[i % 5],
    }
    for i in range(130)
] + [{"input": " ", "output": "No.", "ward": "x"}, {"input": "A?", "output": "", "ward": "x"}]

OWN = "{{ instruction }}\n{{ question }}\nAnswer: {{ answer }}"
SIZES = (1, 4, 8, 9, 10, 20)

Load = Callable[..., Rows]


@pytest.fixture(autouse=True)
def every_cache_is_empty() -> Iterator[None]:
    yield
    sources._load_files.cache_clear()


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a source as one that is larger than memory, 7 rows at a time."""

    def load(source: Path, **options: Any) -> Rows:
        with monkeypatch.context() as patch:
            patch.setattr(large, "STORED_BYTES", 0)
            patch.setattr(streams, "CHUNK_ROWS", 7)
            sources._load_files.cache_clear()
            found = loaded(source, **options)
        sources._load_files.cache_clear()
        assert found.is_stored
        return found

    return load


def loaded(source: Path, **options: Any) -> Rows:
    columns: dict[str, Any] = {"question_column": "input", "answer_column": "output"}
    return load_rows(str(source), **columns | options)


def content(rows: Rows) -> dict[str, list[Any]]:
    return {
        **{name: list(rows[name]) for name in rows.column_names},
        "said before": list(rows.histories),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that a file's name tells."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
        return path
    if name.endswith((".csv", ".tsv")):
        from pyarrow import csv

        table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
        separator = "," if name.endswith(".csv") else "\t"
        csv.write_csv(table, file, csv.WriteOptions(delimiter=separator))
        text = file.getvalue()
    elif name == "array.json":
        text = json.dumps(rows).encode()
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return path


FILES = (
    *("a.jsonl", "a.jsonl.gz", "lines.json", "lines.json.gz", "array.json", "a.csv", "a.csv.gz"),
    *("a.tsv", "a.parquet"),
)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_those_of_a_source_in_memory(tmp_path: Path, name: str, stored: Load) -> None:
    path = write(tmp_path / name, ROWS)
    whole = loaded(path, keep_columns=("ward",))
    assert not whole.is_stored
    assert content(stored(path, keep_columns=("ward",))) == content(whole)


def test_a_data_set_of_the_hub_is_stored_too(monkeypatch: pytest.MonkeyPatch, stored: Load) -> None:
    import datasets

    monkeypatch.setattr(sources, "_hub_rows", lambda _: datasets.Dataset.from_list(ROWS))
    source = Path("someone/cards")
    whole = loaded(source, keep_columns=("ward",))
    sources._load_hub.cache_clear()
    assert content(stored(source, keep_columns=("ward",))) == content(whole)
    sources._load_hub.cache_clear()


def test_files_of_a_folder_are_one_source(tmp_path: Path, stored: Load) -> None:
    write(tmp_path / "1.csv", [{**row, "ward": i % 3} for i, row in enumerate(ROWS)])
    write(tmp_path / "2.jsonl", [{**row, "ward": i % 4} for i, row in enumerate(ROWS)])
    whole = loaded(tmp_path, keep_columns=("ward",))
    assert content(stored(tmp_path, keep_columns=("ward",))) == content(whole)
    assert whole["ward"][:3] == [0, 1, 2]  # integers in both
    write(tmp_path / "3.jsonl", [{"question": "A?", "answer": "B."}])
    told = []
    for load in (loaded, stored):
        with pytest.raises(DataError, match=r"3\.jsonl: there is no column 'input', wh") as caught:
            load(tmp_path)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]},
        {"instruction": "A?", "input": "", "output": "B."},
        {"prompt": "A?", "completion": "B."},
    ],
)
def test_the_form_follows_from_all_rows(tmp_path: Path, row: dict[str, Any], stored: Load) -> None:
    late = {k: "" if isinstance(v, str) else None for k, v in row.items()}
    rows = [late] * 20 + [row] * 3
    if "instruction" in row:
        rows[-1] = {**row, "instruction": "C?", "input": "D?"}
    path = write(tmp_path / "a.jsonl", rows)
    found = content(stored(path))
    assert found == content(loaded(path))
    assert found["input"][-1] in ("A?", "C? D?")


def test_what_is_left_out_is_counted(
    tmp_path: Path, stored: Load, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "A?"}]}] * 9
    stored(write(tmp_path / "a.jsonl", rows))
    assert "9 of 9 conversations are not trained on; the first: line 1: no answer" in (
        capfd.readouterr().err
    )


def test_form_and_unread_columns_are_told_of_what_no_survey_reads(
    tmp_path: Path,
    stored: Load,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [{"instruction": f"{i}.", "input": "A?", "output": "B.", "note": "x"} for i in range(9)]
    path = write(tmp_path / "a.jsonl", rows)
    stored(path)
    assert "read as" not in capfd.readouterr().err
    monkeypatch.setattr(large, "SURVEYED_BYTES", 0)
    stored(path)
    assert capfd.readouterr().err.endswith(
        "a.jsonl: read as Alpaca triples: instruction and input make the question; "
        "columns that are not read: note\n"
    )


FAULTS: dict[str, list[dict[str, Any]]] = {
    "a value": [*ROWS, {"input": ["A?"], "output": "B."}],
    "a column": [{"question": "A?", "output": "B."}],
    "preferences": [{"prompt": "A?", "chosen": "B.", "rejected": "C."}],
    "a column in later rows": [{"prompt": "A?", "completion": "B."}] * 100 + ROWS,
    "no rows": [],
    "labels": [*ROWS, {"input": "A?", "output": "B.", "ward": 2.10}],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_the_same_words(tmp_path: Path, fault: str, stored: Load) -> None:
    path = write(tmp_path / "a.jsonl", FAULTS[fault])
    options = {"keep_columns": ("ward",) if fault == "labels" else ()}
    told = []
    for load in (loaded, stored):
        with pytest.raises(DataError) as caught:
            load(path, **options)
        told.append(str(caught.value))
    assert told[0].replace(": 1 pair of answers", "") == told[1]


def test_a_damaged_file_is_told_with_its_place(tmp_path: Path, stored: Load) -> None:
    (path := tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"input": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
        stored(path)
    (path := tmp_path / "a.csv").write_text("input,output\na,b\nc\n")
    with pytest.raises(DataError, match=r"a\.csv: not valid CSV \(CSV parse error: .*#3"):
        stored(path)
    packed = write(tmp_path / "a.jsonl.gz", ROWS)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the file is damaged"):
        stored(packed)


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_sites_and_their_split_are_the_same(tmp_path: Path, partitioner: str, stored: Load) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)

    def split(rows: Rows, number: int) -> SiteData:
        own = partition_rows(rows, Division(partitioner, "ward", 0.5), Partition(3, number, 5))
        columns = {"question_column": "input", "answer_column": "output"}
        return split_rows(own, Partition(3, number, 5), held_out_fraction=0.2, **columns)

    whole, on_disk = loaded(path, keep_columns=("ward",)), stored(path, keep_columns=("ward",))
    for number in range(5):
        one, other = split(whole, number), split(on_disk, number)
        assert one.report == other.report
        assert list(one.train) == list(other.train)
        assert list(one.held_out) == list(other.held_out)


@pytest.mark.parametrize("seq_length", [64, 44, 40])
@pytest.mark.parametrize("template", ["alpaca", "chat", OWN])
def test_examples_tokenised_on_demand_are_the_same(
    tmp_path: Path, stored: Load, base: tuple[Any, Any], template: str, seq_length: int
) -> None:
    long = [{"input": "fever " * k, "output": "Rest.", "instruction": "Be brief."} for k in SIZES]
    options = {"keep_columns": columns_apart(template)}
    path = write(tmp_path / "a.jsonl", [*long, *ROWS[:20], {"instruction": "Why?", "output": "So"}])
    whole, rows = loaded(path, **options), stored(path, **options)
    assert content(rows) == content(whole)
    columns = {"question_column": "input", "answer_column": "output"}
    examples = split_rows(rows, Partition(3, 0, 1), held_out_fraction=0, **columns).train
    on_demand = OnDemand(examples, base[1], template, seq_length)
    at_once = tokenize_examples(tuple(examples), base[1], template, seq_length)
    assert tuple(on_demand) == at_once.examples == on_demand[:]
    assert on_demand.unlearnable == at_once.unlearnable > (0 if seq_length < 64 else -1)


def test_plain_text_is_the_same(tmp_path: Path, stored: Load, base: tuple[Any, Any]) -> None:
    (path := tmp_path / "a.txt").write_text(
        "\n\n".join(f"Fever {i % 9}.\nRest." for i in range(20))
    )
    rows = stored(path)
    assert content(rows) == content(loaded(path))
    columns = {"question_column": "input", "answer_column": "output"}
    examples = split_rows(rows, Partition(3, 0, 1), held_out_fraction=0, **columns).train
    at_once = tokenize_examples(tuple(examples), base[1], "text", 8)
    assert OnDemand(examples, base[1], "text", 8)[:] == at_once.examples
    with pytest.raises(DataError, match="9 of 9 examples are plain text"):
        OnDemand(examples, base[1], "alpaca", 8)


def test_turns_that_a_template_has_no_room_for_are_counted(
    tmp_path: Path, stored: Load, base: tuple[Any, Any]
) -> None:
    said = [{"role": role, "content": f"{role}?"} for role in ("system", "user", "assistant")]
    rows = stored(write(tmp_path / "a.jsonl", [{"messages": said}, {"messages": said[1:]}]))
    columns = {"question_column": "input", "answer_column": "output"}
    examples = split_rows(rows, Partition(3, 0, 1), held_out_fraction=0, **columns).train
    for template in ("alpaca", OWN):
        with pytest.raises(DataError, match="1 of 2 examples are conversations of several turns"):
            OnDemand(examples, base[1], template, 64)
    for template in ("chat", "{{ system }} {{ question }} {{ answer }}"):
        at_once = tokenize_examples(tuple(examples), base[1], template, 64)
        assert OnDemand(examples, base[1], template, 64)[:] == at_once.examples


def test_a_disk_without_room_is_told_before_and_while_it_fills(
    tmp_path: Path, stored: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10))
        with pytest.raises(DataError, match=r"has 0\.0 GB free where .*set TMPDIR to a folder"):
            stored(path)
    with monkeypatch.context() as patch:
        patch.setattr(spool, "_BUFFER_BYTES", 0)
        patch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Full())
        with pytest.raises(
            DataError, match=r"cannot be written: No space left on device\. Make ro"
        ):
            stored(path)
    monkeypatch.setattr("tempfile.tempdir", None)
    assert len(stored(path)) == len(ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]  # the spool has no name


class Full(io.BytesIO):
    def writelines(self, _: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_array_larger_than_memory_is_refused(
    tmp_path: Path, stored: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_memory, "container_bytes", lambda: 100)
    path = write(tmp_path / "array.json", ROWS)
    with pytest.raises(DataError, match=r"array\.json: .* GB of memory.*Write one object on each"):
        stored(path)
    lines = write(tmp_path / "lines.json", ROWS)
    assert len(stored(lines)) == len(ROWS)
    monkeypatch.setattr(large, "STORED_BYTES", 0)
    with pytest.raises(DataError, match="Under a guarantee all rows of a site are held in memory"):
        loaded(lines, alone=True)


def test_joined_sequences_are_read_in_their_order() -> None:
    parts: list[list[int]] = [[], [1, 2], [], [3], []]
    joined = Joined(parts)
    assert list(joined) == joined[:] == [joined[i] for i in range(len(joined))] == [1, 2, 3]
    assert joined[1:] == [2, 3]
    for place in (3, -1):
        with pytest.raises(IndexError):
            joined[place]
    assert list(Joined[int]([])) == []


IN_A_PROCESS_OF_ITS_OWN = """
import re, sys
from pathlib import Path
from grandrounds.data import large
from grandrounds.data.examples import split_rows
from grandrounds.data.partitioning import Division, Partition, partition_rows
from grandrounds.data.sources import load_rows

def peak_bytes(file):
    columns = {"question_column": "input", "answer_column": "output"}
    rows = load_rows(file, keep_columns=("ward",), **columns)
    assert rows.is_stored
    site = Partition(42, 0, 1)
    own = partition_rows(rows, Division("iid", "", 0.5), site)
    assert len(split_rows(own, site, held_out_fraction=0.1, **columns).train) > 0
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", told)[1]) * 1024

small, big = sys.argv[1:]
large.STORED_BYTES = 0
print(-peak_bytes(small) + peak_bytes(big))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """40,000 rows of 1.2 kB: 48 MB of text, of which 6 MB of places and digests are held."""
    row = {"output": "Rest. " * 190, "ward": "w"}
    with (tmp_path / "big.jsonl").open("w") as file:
        for i in range(40_000):
            file.write(json.dumps({"input": f"What helps patient {i}?", **row}) + "\n")
    write(tmp_path / "small.jsonl", [{"input": "A?", **row}, {"input": "B?", **row}])
    files = [str(tmp_path / f"{name}.jsonl") for name in ("small", "big")]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, *files],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    grown_bytes = int(done.stdout)
    assert 0 < grown_bytes < 24e6
