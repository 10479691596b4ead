"""Benchmarks: read from files or the hub in the hub's columns; a row that cannot be is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from grandrounds.data.common_and_rare.records import rows
from grandrounds.errors import ConfigError, DataError
from grandrounds.study.evaluation import benchmarks as package
from grandrounds.study.evaluation.benchmarks import (
    Item,
    Row,
    benchmarks,
    get_benchmark,
    load_items,
    source_of,
)
from tests.places import SHARED

EVAL = SHARED / "eval"
ROWS: dict[str, dict[str, Any]] = {
    "pubmedqa": {
        "QUESTION": "Does tea help?",
        "CONTEXTS": ["Tea was given.", "It helped."],
        "final_decision": "no",
    },
    "medqa": {
        "question": "What helps?",
        "options": {"A": "tea", "B": "rest", "C": "salt", "D": "heat"},
        "answer": "rest",
        "answer_idx": "B",
    },
    "medmcqa": {"question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3},
    "careqa": {"question": "Q", "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 1},
}
"""One row of each in the hub's own columns."""


def write_lines(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def failure(name: str, folder: Path, **arguments: Any) -> str:
    """Return the message of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        load_items(get_benchmark(name), folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_one(name: str, folder: Path) -> Item:
    write_lines(folder, name, ROWS[name])
    (item,) = load_items(get_benchmark(name), folder)
    return item


# --- The registry ---------------------------------------------------------------------------------


def test_every_module_of_the_package_is_a_benchmark_of_its_own_name() -> None:
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    assert modules == {name.replace("-", "_") for name in benchmarks()}
    assert {"pubmedqa", "medqa", "medmcqa", "careqa", "formulary"} <= modules


def test_another_benchmark_is_one_more_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(str(package.__file__)).with_name("medmcqa.py").read_text()
    (tmp_path / "fifth.py").write_text(source.replace('name="medmcqa"', 'name="fifth"'))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    benchmarks.cache_clear()
    try:
        assert get_benchmark("fifth").expected_items == 4183
    finally:
        benchmarks.cache_clear()
        sys.modules.pop(f"{package.__name__}.fifth", None)


def test_an_unknown_benchmark_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'medqaa'.*pubmedqa.*Did you mean 'medqa'\?"):
        get_benchmark("medqaa")


def test_published_sizes_are_those_of_the_leaderboard() -> None:
    sizes = {name: benchmark.expected_items for name, benchmark in benchmarks().items()}
    formulary = sizes.pop("formulary")
    common_and_rare = sizes.pop("common-and-rare")
    assert sizes.pop("general") == len(load_items(get_benchmark("general"))) == 40
    assert sizes == {"pubmedqa": 500, "medqa": 1273, "medmcqa": 4183, "careqa": 5621}
    assert formulary == len(load_items(get_benchmark("formulary")))
    assert common_and_rare == len(load_items(get_benchmark("common-and-rare"))) == 228


def test_import_loads_no_library() -> None:
    code = (
        "import sys, grandrounds.study.evaluation.verification\n"
        "import grandrounds.study.evaluation.benchmarks as b\n"
        "b.benchmarks()\n"
        "heavy = ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- Rows -----------------------------------------------------------------------------------------


def test_pubmedqa_is_read_with_its_paragraphs(tmp_path: Path) -> None:
    item = read_one("pubmedqa", tmp_path)
    assert item.context == ("Tea was given.", "It helped.")
    assert item.labels == item.options == ("yes", "no", "maybe")
    assert item.gold_index == 1


def test_pubmedqa_may_have_the_columns_of_the_authors_own_data_set(tmp_path: Path) -> None:
    """`qiaojin/PubMedQA`, `pqa_labeled`; once there was "no column 'QUESTION'"."""
    item = read_one("pubmedqa", tmp_path)
    row = ROWS["pubmedqa"]
    authors = {
        "pubid": 1,
        "question": row["QUESTION"],
        "context": {"contexts": row["CONTEXTS"], "labels": ["BACKGROUND", "RESULTS"]},
        "long_answer": "Tea did not help.",
        "final_decision": row["final_decision"],
    }
    write_lines(tmp_path, "pubmedqa", authors)
    assert load_items(get_benchmark("pubmedqa"), tmp_path) == (item,)
    write_lines(tmp_path, "pubmedqa", {**authors, "context": "Tea was given."})
    assert "column 'context': the value is 'Tea was given.'" in failure("pubmedqa", tmp_path)


def test_medqa_options_may_be_an_object_or_a_list(tmp_path: Path) -> None:
    item = read_one("medqa", tmp_path)
    pairs = [{"key": key, "value": text} for key, text in ROWS["medqa"]["options"].items()]
    write_lines(tmp_path, "medqa", {**ROWS["medqa"], "options": pairs})
    assert load_items(get_benchmark("medqa"), tmp_path) == (item,)
    assert item.options == ("tea", "rest", "salt", "heat")
    assert item.gold_index == 1


def test_medmcqa_counts_from_zero_and_careqa_from_one(tmp_path: Path) -> None:
    medmcqa, careqa = read_one("medmcqa", tmp_path), read_one("careqa", tmp_path)
    assert medmcqa.options == careqa.options == ("a", "b", "c", "d")
    assert (medmcqa.gold_index, careqa.gold_index) == (3, 0)


def test_the_formulary_holds_private_and_public_facts_and_needs_no_file(tmp_path: Path) -> None:
    from grandrounds.data.formulary.facts import questions

    items = load_items(get_benchmark("formulary"), tmp_path)
    assert [item.row for item in items] == list(range(1, len(items) + 1))
    for kind in ("private", "public"):
        part = [item for item in items if item.group == kind]
        assert [(i.question, i.options, i.gold_index) for i in part] == [
            (q.question, q.options, q.answer_index) for q in questions(kind)
        ]


def test_common_and_rare_facts_are_asked_with_all_24_values() -> None:
    items = load_items(get_benchmark("common-and-rare"))
    groups = Counter(item.group for item in items)
    assert groups == {"common": 18, "rare": 105, "absent": 105}
    assert {len(set(item.options)) for item in items} == {24}
    stated = {(str(row["input"]), str(row["output"])) for row in rows()}
    for item in items:
        answer = (item.question, item.options[item.gold_index])
        assert (answer in stated) == (item.group == "rare")


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("medmcqa", {"cop": -1}, "column 'cop': the value is -1; allowed is one of 0, 1, 2, 3"),
        ("medmcqa", {"cop": True}, "column 'cop': the value is True"),
        ("medmcqa", {"cop": None}, "column 'cop': the value is None"),
        ("medmcqa", {"opc": None}, "column 'opc': the value is None; allowed is a string"),
        ("medmcqa", {"question": "\ud800"}, "column 'question'"),
        ("careqa", {"cop": 0}, "column 'cop': the value is 0; allowed is one of 1, 2, 3, 4"),
        ("pubmedqa", {"final_decision": "Yes"}, "'Yes'; allowed is one of yes, no, maybe"),
        ("pubmedqa", {"CONTEXTS": "text"}, "'text'; allowed is a list of strings"),
        ("pubmedqa", {"CONTEXTS": [None]}, "column 'CONTEXTS'"),
        ("medqa", {"answer": "sleep"}, "'sleep'; allowed is the text of one of the options"),
        ("medqa", {"answer_idx": "C"}, "'C'; allowed is B, the option whose text is `answer`"),
        ("medqa", {"answer_idx": "E"}, "'E'; allowed is one of A, B, C, D"),
        ("medqa", {"options": {"A": "tea", "B": "rest"}}, "column 'options'"),
        ("medqa", {"options": ["tea", "rest", "salt", "heat"]}, "column 'options'"),
        ("medqa", {"options": "tea"}, "column 'options': the value is 'tea'"),
    ],
)
def test_an_impossible_value_is_named_with_row_column_and_what_is_allowed(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, name, ROWS[name], {**ROWS[name], **changes})
    message = failure(name, tmp_path)
    assert message.startswith(f"{path}, line 2, column ")
    assert told in message


def test_a_missing_column_is_named_with_its_row_and_the_nearest(tmp_path: Path) -> None:
    row = dict(ROWS["medmcqa"])
    row["opt_c"] = row.pop("opc")
    path = write_lines(tmp_path, "medmcqa", ROWS["medmcqa"], row)
    message = failure("medmcqa", tmp_path)
    assert message.startswith(f"{path}, line 2: there is no column 'opc'")
    assert "Did you mean 'op" in message


def test_a_long_value_is_cut_in_the_message() -> None:
    row = Row(1, "here", {"question": ["word"] * 1000})
    assert len(str(row.refused("question", "text"))) < 150


# --- Files ----------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_items(tmp_path: Path) -> None:
    rows = [{**ROWS["medmcqa"], "question": f"Q{i}", "cop": i} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    found = []
    for ending in package.FILE_ENDINGS:
        folder = tmp_path / ending
        folder.mkdir()
        path = folder / f"medmcqa{ending}"
        if ending == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif ending.endswith(".gz"):
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(json.dumps(rows) if ending == ".json" else lines)
        found.append(load_items(get_benchmark("medmcqa"), folder))
    assert [item.gold_index for item in found[0]] == [0, 1, 2, 3]
    assert all(items == found[0] for items in found)


def test_a_limit_samples_every_answer_of_a_sorted_file(tmp_path: Path) -> None:
    """The first 150 of PubMedQA's rows all have the answer yes: a model that says yes had 100 %."""
    answers = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55
    write_lines(tmp_path, "pubmedqa", *({**ROWS["pubmedqa"], "final_decision": a} for a in answers))
    items = load_items(get_benchmark("pubmedqa"), tmp_path, limit=100)
    assert Counter(item.gold_index for item in items) == {0: 55, 1: 34, 2: 11}
    assert [item.row for item in items] == sorted({item.row for item in items})
    assert items == load_items(get_benchmark("pubmedqa"), tmp_path, limit=100)
    assert len(load_items(get_benchmark("pubmedqa"), tmp_path, limit=1000)) == 500


def test_the_rows_beyond_a_limit_are_checked(tmp_path: Path) -> None:
    write_lines(tmp_path, "medmcqa", ROWS["medmcqa"], {"question": "broken"})
    with pytest.raises(DataError, match="line 2: there is no column"):
        load_items(get_benchmark("medmcqa"), tmp_path, limit=1)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        load_items(get_benchmark("medmcqa"), tmp_path, limit=0)


def test_two_files_of_one_benchmark_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path, "medmcqa", ROWS["medmcqa"])
    (tmp_path / "medmcqa.json").write_text("[]")
    assert "medmcqa.jsonl, medmcqa.json" in failure("medmcqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("medmcqa.jsonl", b"", "there are no rows"),
        ("medmcqa.json", b"[]", "there are no rows"),
        ("medmcqa.jsonl", b"{\n", "line 1: not valid JSON"),
        ("medmcqa.jsonl", b"3\n", "line 1: 3 is not a JSON object"),
        ("medmcqa.jsonl.gz", b"no gzip", "the file is damaged"),
        ("medmcqa.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "the file is damaged"),
        ("medmcqa.parquet", b"no parquet", "not a valid Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert told in failure("medmcqa", tmp_path)


def test_a_missing_folder_says_what_it_must_hold(tmp_path: Path) -> None:
    assert "no such folder; it must contain one file" in failure("medqa", tmp_path / "none")


def test_the_source_of_a_file_is_its_hash(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "medqa", ROWS["medqa"])
    assert source_of(get_benchmark("medqa"), tmp_path) == {
        "file": "medqa.jsonl",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_the_source_of_the_formulary_is_the_hash_of_its_rows() -> None:
    first, second = (source_of(get_benchmark("formulary")) for _ in range(2))
    assert first == second
    assert first["built-in"] == "formulary"
    assert len(first["rows-sha256"]) == 64


# --- The hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that holds one row of MedMCQA, and keeps what it is asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options))
        name = "pubmedqa" if arguments[0] == "parquet" else "medmcqa"
        loaded = datasets.Dataset.from_list([ROWS[name]])
        if name == "medmcqa":
            url = f"hf://datasets/openlifescienceai/medmcqa@{'ab' * 20}/data/validation.parquet"
            loaded.info.download_checksums = {url: {}}
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_without_a_file_the_hub_is_asked_for_the_published_split(
    hub: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (item,) = load_items(get_benchmark("medmcqa"), tmp_path)
    assert item.gold_index == 3
    assert hub == [("openlifescienceai/medmcqa", None, {"split": "validation"})]


def test_pubmedqa_is_read_without_its_loading_script(hub: list[tuple[Any, ...]]) -> None:
    assert load_items(get_benchmark("pubmedqa"))[0].gold_index == 1
    folder = "bigbio/pubmed_qa@refs/convert/parquet/pubmed_qa_labeled_fold0_source/test"
    files = f"hf://datasets/{folder}/*.parquet"
    assert hub == [("parquet", {"data_files": files, "split": "train"})]


def test_the_source_of_hub_rows_names_the_commit(hub: list[tuple[Any, ...]]) -> None:
    source = source_of(get_benchmark("medmcqa"))
    assert source["hub"] == "openlifescienceai/medmcqa"
    assert source["revision"] == "ab" * 20
    assert source_of(get_benchmark("pubmedqa"))["revision"] == "refs/convert/parquet"


@pytest.mark.parametrize("name", ["careqa", "pubmedqa"])
def test_without_hub_and_file_the_error_says_what_to_do(name: str, tmp_path: Path) -> None:
    message = failure(name, tmp_path)
    assert f"benchmark {name!r} could not be loaded from the Hugging Face hub" in message
    assert f"{tmp_path} has no file of it either" in message
    assert f"use --data DIR, a folder with {name} as one of: .jsonl" in message


# --- Real data ------------------------------------------------------------------------------------


@pytest.mark.skipif(not EVAL.is_dir(), reason=f"no real benchmark rows at {EVAL}")
@pytest.mark.parametrize(
    ("name", "golds"),
    [
        ("pubmedqa", {"yes": 276, "no": 24}),
        ("medqa", {"A": 171, "B": 144, "C": 160, "D": 125}),
        ("medmcqa", {"A": 637, "B": 525, "C": 445, "D": 393}),
    ],
)
def test_real_rows_are_read_with_their_answers(name: str, golds: dict[str, int]) -> None:
    """Counted in the files with `zcat FILE | grep -c`; PubMedQA's `maybe` rows all come late."""
    items = load_items(get_benchmark(name), EVAL)
    assert Counter(item.labels[item.gold_index] for item in items) == golds
