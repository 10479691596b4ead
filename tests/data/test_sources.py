"""Data sources: what is read from each, and what is said when it cannot be."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from grandrounds.data import sources
from grandrounds.data.places import OnHub
from grandrounds.data.rows import Rows
from grandrounds.data.sources import load_rows
from grandrounds.data.survey import survey
from grandrounds.errors import DataError
from tests.places import ROOT, SHARED

ROWS = [
    {"instruction": "i", "input": "What is fever?", "output": "Warmth.", "site": 3},
    {"instruction": "i", "input": 'Was "ödem"\nist?', "output": "Wasser, viel", "site": 1},
]
WIKIDOC = SHARED / "train/wikidoc_patient_information.jsonl.gz"


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    yield
    for loader in (sources._load_embedded, sources._load_files, sources._load_hub):
        loader.cache_clear()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a test tried the network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def read(source: str | Path, **changes: Any) -> datasets.Dataset:
    """Load with the default columns."""
    return rows_of(source, **changes).as_dataset()


def rows_of(source: str | Path, **changes: Any) -> Rows:
    arguments: dict[str, Any] = {"question_column": "input", "answer_column": "output"} | changes
    return load_rows(str(source), **arguments)


def failure(source: str | Path, **changes: Any) -> str:
    """Return the message of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        read(source, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, compressed if its name says so."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CSV = """instruction,input,output,site
i,What is fever?,Warmth.,3
i,"Was ""ödem""
ist?","Wasser, viel",1
"""
CONTENT = {
    "lines.jsonl": json_lines(ROWS),
    "lines.jsonl.gz": json_lines(ROWS),
    "lines.json": json_lines(ROWS),
    "array.json": json.dumps(ROWS, indent=2),
    "array.json.gz": " \n" + json.dumps(ROWS),
    "blank_lines.jsonl": "\n" + json_lines(ROWS).replace("\n", "\n \n"),
    "byte_order_mark.jsonl": "\ufeff" + json_lines(ROWS),
    "byte_order_mark.json": "\ufeff" + json.dumps(ROWS),
    "table.csv": CSV,
    "table.csv.gz": CSV,
    "byte_order_mark.csv": "\ufeff" + CSV,
    "UPPER.CSV": CSV,
}


@pytest.mark.usefixtures("no_hub")
class TestEveryFormatGivesTheSameRows:
    @pytest.mark.parametrize("name", CONTENT)
    def test_text_format(self, tmp_path: Path, name: str) -> None:
        rows = read(write(tmp_path / name, CONTENT[name]), keep_columns=["site"])
        assert rows.to_list() == [{k: row[k] for k in ("input", "output", "site")} for row in ROWS]

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "table.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        rows = read(path, keep_columns=["site"])
        assert rows.to_list() == [{k: row[k] for k in ("input", "output", "site")} for row in ROWS]

    def test_columns_can_be_chosen(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json_lines(ROWS))
        rows = read(path, question_column="output", answer_column="instruction")
        assert rows.column_names == ["output", "instruction"]
        assert rows["output"][:] == ["Warmth.", "Wasser, viel"]

    @pytest.mark.parametrize("name", CONTENT)
    def test_two_columns_may_be_the_question(self, tmp_path: Path, name: str) -> None:
        both = "instruction,input"
        path = write(tmp_path / name, CONTENT[name])
        rows = read(path, question_column=both, keep_columns=["site"])
        assert rows.to_list() == [
            {both: f"i {row['input']}", "output": row["output"], "site": row["site"]}
            for row in ROWS
        ]
        found = survey(str(path), both, "output", "site")
        assert found is not None
        assert found.usable_by_label == {3: 1, 1: 1}
        assert "there is no column 'inst'" in failure(path, question_column="inst,input")

    def test_relative_path_and_home_are_understood(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "a.jsonl", json_lines(ROWS))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for source in ("a.jsonl", "./a.jsonl", "~/a.jsonl"):
            assert len(read(source)) == 2

    def test_csv_row_longer_than_a_mebibyte_is_read(self, tmp_path: Path) -> None:
        long = "x" * (3 << 20)
        path = write(tmp_path / "a.csv", f"input,output\nq,{long}\nr,s\n")
        assert [len(text) for text in read(path)["output"]] == [3 << 20, 1]


@pytest.mark.usefixtures("no_hub")
class TestInstructions:
    """FlowerTune's medical app drops the column, which is the same in all of its rows."""

    @pytest.mark.parametrize("name", CONTENT)
    def test_that_differ_are_not_left_out(self, tmp_path: Path, name: str) -> None:
        """Alpaca's questions were ignored, and rows without an input were "empty"."""
        content = CONTENT[name].replace('"i"', '"j"', 1).replace("\ni,W", "\nj,W", 1)
        path = write(tmp_path / name, content)
        found = survey(str(path), "input", "output")
        assert found is not None
        assert found.form == "Alpaca triples: instruction and input make the question"
        asked = rows_of(path)["input"]
        assert asked == rows_of(path, question_column="instruction,input")["instruction,input"]
        assert {text[:2] for text in asked} == {"i ", "j "}

    def test_without_input_stand_alone(self, tmp_path: Path) -> None:
        rows = [{**ROWS[0], "input": empty} for empty in ("", None, " ")]
        path = write(tmp_path / "a.jsonl", json_lines([*rows, ROWS[0]]))
        found = rows_of(path, question_column="instruction,input")
        assert found["instruction,input"] == ["i", "i", "i", "i What is fever?"]
        assert read(path)["input"][:2] == ["", ""]

    def test_beside_a_question_of_another_name_are_no_matter(self, tmp_path: Path) -> None:
        rows = [{"instruction": i, "question": "q", "output": "a"} for i in "xy"]
        path = write(tmp_path / "a.jsonl", json_lines(rows))
        assert read(path, question_column="question")["question"][:] == ["q", "q"]

    def test_a_column_with_a_comma_in_its_name_is_itself(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json_lines([{"a,b": "q", "a": "x", "output": "y"}]))
        assert read(path, question_column="a,b")["a,b"][:] == ["q"]


@pytest.mark.usefixtures("no_hub")
class TestValues:
    def test_missing_values_are_empty_and_numbers_are_text(self, tmp_path: Path) -> None:
        content = '{"input": null, "output": 7}\n{"output": 2.5}\n{"input": NaN, "output": true}\n'
        rows = read(write(tmp_path / "a.jsonl", content))
        assert rows.to_list() == [
            {"input": "", "output": "7"},
            {"input": "", "output": "2.5"},
            {"input": "", "output": "True"},
        ]

    def test_csv_numbers_keep_their_digits(self, tmp_path: Path) -> None:
        rows = read(write(tmp_path / "a.csv", "input,output\n007,1.50\n,NA\n"))
        assert rows.to_list() == [
            {"input": "007", "output": "1.50"},
            {"input": "", "output": "NA"},
        ]

    def test_kept_columns_are_all_integers_or_all_text(self, tmp_path: Path) -> None:
        row = {"input": "q", "output": "a"}
        content = json_lines(
            [row | {"i": 1, "m": 1, "n": None}, row | {"i": None, "m": "x", "n": None}]
        )
        rows = read(write(tmp_path / "a.jsonl", content), keep_columns=["i", "m", "n"])
        assert rows["i"][:] == [1, None]
        assert rows["m"][:] == ["1", "x"]
        assert rows["n"][:] == [None, None]

    @pytest.mark.parametrize(
        ("cells", "labels"),
        [
            (["1.1", "1.10"], ["1.1", "1.10"]),  # both were 1.1
            (["001", "01", "1"], ["001", "01", "1"]),  # all were 1
            (["NA", "null", "nan"], ["NA", "null", "nan"]),  # all were missing
            (["1E10", "10E9"], ["1E10", "10E9"]),  # both were 10000000000.0
            (["10", "9", "-3"], [10, 9, -3]),
            (["10", ""], [10, None]),
            (["12345678901234567890"], ["12345678901234567890"]),
        ],
    )
    def test_csv_labels_are_as_they_are_written(
        self, tmp_path: Path, cells: list[str], labels: list[object]
    ) -> None:
        content = "input,output,site\n" + "".join(f"q,a,{cell}\n" for cell in cells)
        rows = read(write(tmp_path / "a.csv", content), keep_columns=["site"])
        assert rows["site"] == labels

    @pytest.mark.parametrize(
        ("values", "labels"),
        [
            (["1.10", "1.1"], ["1.10", "1.1"]),  # both were 1.1
            (["1E10", "10E9"], ["1E10", "10E9"]),  # both were 10000000000.0
            (["1", '""', '" "', "null"], [1, None, None, None]),  # blanks were sites
            (["1", "1.0", '"x"'], ["1", "1.0", "x"]),
        ],
    )
    def test_json_labels_are_as_they_are_written(
        self, tmp_path: Path, values: list[str], labels: list[object]
    ) -> None:
        rows = [f'{{"input": "q", "output": 1.10, "site": {value}}}' for value in values]
        for name, content in (
            ("a.jsonl", "\n".join(rows)),
            ("a.json", f"[{','.join(rows)}]"),
        ):
            found = read(write(tmp_path / name, content), keep_columns=["site"])
            assert found["site"] == labels
            assert found["output"][0] == "1.1"

    @pytest.mark.parametrize("values", [(1, "1"), (1.5, "1.5"), (True, "True")])
    def test_a_label_that_is_number_and_text_is_refused(
        self, tmp_path: Path, values: tuple[object, object]
    ) -> None:
        """They were one site."""
        rows = [{"input": "q", "output": "a", "site": value} for value in values]
        path = write(tmp_path / "a.jsonl", json_lines(rows))
        assert "column 'site': " in failure(path, keep_columns=["site"])

    def test_value_that_is_no_text_is_named_with_its_line(self, tmp_path: Path) -> None:
        content = json_lines(ROWS) + '\n{"input": ["q"], "output": "a"}\n'
        message = failure(write(tmp_path / "a.jsonl", content))
        assert "line 4, column 'input'" in message
        assert "the value is a list of length 1, but only text" in message

    def test_half_a_surrogate_pair_is_named_with_its_line(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "a.jsonl", '{"input": "q", "output": "a\\ud800"}\n'))
        assert "line 1, column 'output': character 2" in message


@pytest.mark.usefixtures("no_hub")
class TestMissingAndUnknownFiles:
    def test_missing_file_suggests_the_nearest_name(self, tmp_path: Path) -> None:
        write(tmp_path / "cards.jsonl", json_lines(ROWS))
        message = failure(tmp_path / "card.jsonl")
        assert "no such file. Did you mean 'cards.jsonl'?" in message
        assert ".parquet" in message

    def test_missing_folder_is_named(self, tmp_path: Path) -> None:
        assert f"There is no folder '{tmp_path}/x' either" in failure(tmp_path / "x" / "a.csv")

    def test_folder_without_such_files_is_refused(self, tmp_path: Path) -> None:
        assert "this folder holds no file that can be read (.json" in failure(tmp_path)
        assert "no file has such a name" in failure(tmp_path / "*.csv")

    def test_a_folders_links_and_files_without_rows_are_not_passed_over(
        self, tmp_path: Path
    ) -> None:
        write(tmp_path / "a.jsonl", json_lines(ROWS))
        (tmp_path / "b.jsonl").mkdir()
        assert len(read(tmp_path)) == len(ROWS)
        (tmp_path / "c.jsonl").symlink_to("nowhere")
        assert "c.jsonl is a broken link" in failure(tmp_path)
        (tmp_path / "c.jsonl").unlink()
        write(tmp_path / "d.jsonl", "")
        assert "d.jsonl: it has no rows" in failure(tmp_path)

    def test_folder_of_folders_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").mkdir()
        assert "holds no file that can be read" in failure(tmp_path)

    def test_the_only_file_of_a_folder_is_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", "{")
        assert "a.jsonl, line 1" in failure(tmp_path)

    def test_home_of_an_unknown_user_is_one_line(self) -> None:
        assert "cannot be read" in failure("~no-such-user-here/a.jsonl")

    def test_unknown_ending_lists_the_known_ones(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "cards.xlsx", "x"))
        assert "'.xlsx' cannot be read" in message
        assert ".jsonl.gz" in message


@pytest.mark.usefixtures("no_hub")
class TestMalformedFiles:
    def test_wrong_column_lists_columns_and_suggests_the_nearest(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json_lines(ROWS))
        message = failure(path, question_column="inptu")
        assert "no column 'inptu'; the columns are: instruction, input, output, site." in message
        assert "Did you mean 'input'? Set data.question-column" in message
        assert "Write data.answer-column=output." in failure(path, answer_column="answer")
        assert "Write data.partition-by=site." in failure(path, keep_columns=["hospital"])

    @pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
    def test_wrong_column_of_a_table(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        if name == "a.csv":
            write(path, CSV)
        else:
            parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        message = failure(path, answer_column="outputs")
        assert "the columns are: instruction, input, output, site." in message
        assert "Did you mean 'output'?" in message

    def test_values_separated_by_semicolons(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "a.csv", "input;output\nA?;B.\n"))
        assert "its values are separated by ';', it seems" in message

    def test_one_column_of_both(self, tmp_path: Path) -> None:
        message = failure(
            write(tmp_path / "a.jsonl", json_lines(ROWS)),
            question_column="input",
            answer_column="input",
        )
        assert "are both 'input'. For plain text" in message

    def test_turns_as_text(self, tmp_path: Path) -> None:
        row = json.dumps({"messages": json.dumps([{"role": "user", "content": "A?"}])})
        assert "'messages' holds text, not lists" in failure(write(tmp_path / "a.jsonl", row))

    def test_column_that_occurs_twice(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "a.csv", "input,output,input\n1,2,3\n"))
        assert "2 columns named 'input'" in message

    def test_malformed_line_is_shown_with_its_number(self, tmp_path: Path) -> None:
        content = json_lines(ROWS) + "\n" + '{"input": "What is a cold?", "output": "A v'
        message = failure(write(tmp_path / "a.jsonl.gz", content))
        assert "line 4: not valid JSON" in message
        assert """the line begins '{"input": "What is a cold?", "output": "'""" in message

    def test_malformed_line_of_an_array_is_shown_with_its_number(self, tmp_path: Path) -> None:
        content = '[\n{"input": "q", "output": "a"},\n{"input": "r" "output": "b"}\n]'
        message = failure(write(tmp_path / "a.json", content))
        assert "line 3: not valid JSON" in message
        assert """begins '{"input": "r" """ in message

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_line_that_is_not_utf8(self, tmp_path: Path, name: str) -> None:
        content = json_lines(ROWS[:1]).encode() + '{"input": "Fußpilz"}'.encode("latin-1")
        assert "line 2: not valid JSON (not UTF-8)" in failure(write(tmp_path / name, content))

    def test_array_that_is_not_utf8(self, tmp_path: Path) -> None:
        content = '[\n{"input": "Fußpilz"}]'.encode("latin-1")
        assert "line 2: not valid JSON (not UTF-8)" in failure(write(tmp_path / "a.json", content))

    def test_number_that_is_too_long(self, tmp_path: Path) -> None:
        row = '{"input": "A?", "output": ' + "9" * 5000 + "}"
        told = "not valid JSON (a number is too long)"
        assert f"line 2: {told}" in failure(write(tmp_path / "a.jsonl", "\n" + row))
        assert f"line 1: {told}" in failure(write(tmp_path / "a.json", f"[{row}]"))

    @pytest.mark.parametrize("line", ["[1, 2]", '"text"', "12", "null"])
    def test_line_that_is_no_object(self, tmp_path: Path, line: str) -> None:
        message = failure(write(tmp_path / "a.jsonl", json_lines(ROWS) + line + "\n"))
        assert f"line 3: {line} is not a JSON object" in message

    def test_array_item_that_is_no_object(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "a.json", json.dumps([*ROWS, "text"])))
        assert 'row 3: "text" is not a JSON object' in message

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_json_without_rows(self, tmp_path: Path, name: str, content: str) -> None:
        assert "has no rows" in failure(write(tmp_path / name, content))

    def test_other_files_without_rows(self, tmp_path: Path) -> None:
        assert "has no rows" in failure(write(tmp_path / "a.json", "[]"))
        assert "has no rows" in failure(write(tmp_path / "a.csv", "input,output\n"))
        assert "Empty CSV" in failure(write(tmp_path / "b.csv", ""))
        parquet.write_table(pyarrow.table({"input": [], "output": []}), tmp_path / "a.parquet")
        assert "has no rows" in failure(tmp_path / "a.parquet")

    def test_csv_row_with_a_missing_value(self, tmp_path: Path) -> None:
        message = failure(write(tmp_path / "a.csv", "input,output\nq,a\nr\n"))
        assert "not valid CSV" in message
        assert "#3" in message

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz"])
    def test_corrupt_gzip(self, tmp_path: Path, name: str) -> None:
        whole = gzip.compress(json_lines(ROWS * 50).encode())
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert "damaged" in failure(tmp_path / name)
        (tmp_path / name).write_bytes(whole[:12] + b"\xff" * 20 + whole[32:])
        assert "damaged" in failure(tmp_path / name)
        (tmp_path / name).write_text(json_lines(ROWS))
        assert "Not a gzipped file" in failure(tmp_path / name)

    def test_corrupt_parquet(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", b"PAR1 this is no Parquet file, though it begins so")
        assert "not a valid Parquet file" in failure(path)
        parquet.write_table(pyarrow.Table.from_pylist(ROWS * 500), path)
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + b"\xff" * 300 + whole[304:])
        message = failure(path)
        assert "Parquet" in message or "damaged" in message


@pytest.mark.usefixtures("no_hub")
class TestCache:
    def test_unchanged_file_gives_the_same_object_and_a_changed_one_new_rows(
        self, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.jsonl", json_lines(ROWS))
        first = rows_of(path)
        assert rows_of(path) is first
        assert read(path, keep_columns=["site"]) is not first
        write(path, json_lines(ROWS[:1]))
        assert len(read(path)) == 1


class TestFormulary:
    def test_flashcards_are_read_with_the_site_that_knows_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        facts = pytest.importorskip("grandrounds.data.formulary.facts")
        monkeypatch.setattr(facts, "flashcards", lambda: ROWS)
        rows = read("formulary", keep_columns=["site"])
        assert rows["site"][:] == [3, 1]
        assert rows["output"][:] == ["Warmth.", "Wasser, viel"]

    def test_the_real_flashcards_have_the_default_columns(self) -> None:
        rows = read("formulary", keep_columns=["site"])
        assert rows.column_names == ["input", "output", "site"]
        assert all(rows["input"])
        assert all(rows["output"])


class TestHub:
    def test_split_train_of_a_hub_data_set_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(path: str, split: str, **named: str) -> datasets.Dataset:
            revision = named.get("revision", "main")
            asked.append((path, split, revision, named.get("name")))
            assert datasets.utils.are_progress_bars_disabled()
            loaded = datasets.Dataset.from_list(ROWS)
            if revision != "main":
                url = f"hf://datasets/{path}@{'ab' * 20}/train.jsonl"
                loaded.info.download_checksums = {url: {}}
            return loaded

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        for _ in range(2):
            rows = read("someone/cards", keep_columns=["site"])
        assert asked == [("someone/cards", "train", "main", None)]
        assert not datasets.utils.are_progress_bars_disabled()
        assert rows.to_list() == [{k: row[k] for k in ("input", "output", "site")} for row in ROWS]
        columns = {"question_column": "input", "answer_column": "output"}
        assert load_rows("someone/cards", **columns).commit == ""
        assert load_rows("someone/cards@v2", **columns).commit == "ab" * 20
        assert asked[-1] == ("someone/cards", "train", "v2", None)
        place = OnHub("someone/cards", "pqa_labeled", "test[:100]", "v2")
        load_rows(str(place), **columns)
        assert str(place) == "someone/cards:pqa_labeled[test[:100]]@v2"
        assert asked[-1] == ("someone/cards", "test[:100]", "v2", "pqa_labeled")

    def test_wrong_column_of_a_hub_data_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS)
        )
        assert "Did you mean 'input'?" in failure("someone/cards", question_column="inputs")

    @pytest.mark.parametrize(
        "error", [ConnectionError("no route\nto host"), ValueError('Unknown split "train".')]
    )
    def test_hub_failure_is_one_line_that_names_the_ways_out(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        message = failure("formulry")
        assert str(error).splitlines()[0].rstrip(".") in message
        assert "Did you mean 'formulary'?" in message
        assert "local file (.json," in message

    def test_offline_hub_data_set_is_one_line_and_nothing_else_is_printed(
        self, tmp_path: Path
    ) -> None:
        program = (
            "import sys\n"
            "import grandrounds.data.examples, grandrounds.data.sources\n"
            "heavy = {'datasets', 'flwr', 'flwr_datasets', 'torch', 'pyarrow'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "from grandrounds.errors import DataError\n"
            "try:\n"
            "    grandrounds.data.sources.load_rows(\n"
            "        'someone/cards', question_column='input', answer_column='output')\n"
            "except DataError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        assert (
            "'someone/cards' is neither built-in data (formulary, formulary-preferences, "
            "common-and-rare) nor a file" in done.stdout
        )


@pytest.mark.skipif(not WIKIDOC.exists(), reason="shared/data/train is not here")
def test_wikidoc_has_4952_rows_of_text() -> None:
    rows = read(WIKIDOC)
    assert len(rows) == 4952
    assert rows.column_names == ["input", "output"]
