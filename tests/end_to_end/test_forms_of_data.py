"""The same questions and answers in every form train the same adapter, bit for bit."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import csv, parquet

from grandrounds.data import large
from tests.runs import adapter_bytes, metrics_of, play, read_json

PAIRS = [
    (f"What helps patient {i} against {what}, and when?", f"Rest, and {1 + i % 7} cups of tea.")
    for i, what in enumerate(["fever", "cough", "rash", "pain"] * 6)
]
ROWS = [{"input": question, "output": answer} for question, answer in PAIRS]


def separated(separator: str) -> bytes:
    file = io.BytesIO()
    csv.write_csv(pyarrow.Table.from_pylist(ROWS), file, csv.WriteOptions(delimiter=separator))
    return file.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


def turns(question: str, answer: str, *, role: str, content: str, names: str) -> Any:
    asks, answers = names.split()
    return [{role: asks, content: question}, {role: answers, content: answer}]


OPENAI = {"role": "role", "content": "content", "names": "user assistant"}
SHAREGPT = {"role": "from", "content": "value", "names": "human gpt"}

FORMS: dict[str, bytes] = {
    "lines.jsonl": lines(ROWS),
    "pairs.csv": separated(","),
    "pairs.tsv": separated("\t"),
    "array.json": json.dumps(ROWS).encode(),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "pairs.parquet": packed(),
    "alpaca.json": json.dumps(
        [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
    ).encode(),
    "completion.jsonl": lines([{"prompt": q, "completion": a} for q, a in PAIRS]),
    "messages.jsonl": lines([{"messages": turns(*pair, **OPENAI)} for pair in PAIRS]),
    "sharegpt.json": json.dumps(
        [{"conversations": turns(*pair, **SHAREGPT)} for pair in PAIRS]
    ).encode(),
}


def trained(folder: Path, name: str, content: bytes, **changes: Any) -> bytes:
    """Return the adapter of one round of two sites on the embedded base."""
    (folder / name).write_bytes(content)
    settings: dict[str, Any] = {
        "static.dataset.name": str(folder / name),
        "num-server-rounds": 1,
        "data.num-partitions": 2,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 1.0,
        "model.lora.peft-lora-r": 2,
        "train.num-threads": 1,
        "train.training-arguments.max-steps": 2,
        "train.training-arguments.per-device-train-batch-size": 4,
        "run-directory": str(folder / f"run of {name}"),
    }
    return adapter_bytes(play(settings, **changes))


@pytest.fixture(scope="module")
def of_lines(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of JSON lines."""
    name = "lines.jsonl"
    return trained(tmp_path_factory.mktemp("lines"), name, FORMS[name])


@pytest.mark.parametrize("name", [name for name in FORMS if name != "lines.jsonl"])
def test_every_form_trains_the_same_adapter(tmp_path: Path, of_lines: bytes, name: str) -> None:
    assert trained(tmp_path, name, FORMS[name]) == of_lines


def test_rows_stored_on_the_disk_train_the_same_adapter(
    tmp_path: Path, of_lines: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "STORED_BYTES", 0)
    assert trained(tmp_path, "lines.jsonl", FORMS["lines.jsonl"]) == of_lines
    run = tmp_path / "run of lines.jsonl"
    site, other = read_json(run / "sites.json")
    assert site["data-tag"].startswith("t")
    assert site["data-tag"] != other["data-tag"]
    assert "truncated" not in site
    assert metrics_of(run)[-1]["held-out-loss"] > 0


# --- Conversations --------------------------------------------------------------------------------

ASKED_TWICE = [
    ["Be brief.", *first, "And what else?", second[1]]
    for first, second in itertools.pairwise(PAIRS)
]
ROLES = {"role": ["system", "user", "assistant"] * 2, "from": ["system", "human", "gpt"] * 2}


def conversations(role: str, content: str) -> list[Any]:
    names = [ROLES[role][number] for number in (0, 1, 2, 1, 2)]
    return [
        [{role: name, content: text} for name, text in zip(names, said, strict=True)]
        for said in ASKED_TWICE
    ]


def test_conversations_train_the_same_adapter_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = [{"messages": said} for said in conversations("role", "content")]
    sharegpt = [{"conversations": said} for said in conversations("from", "value")]
    columns = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(openai), columns)
    forms = {
        "messages.jsonl": lines(openai),
        "sharegpt.json": json.dumps(sharegpt).encode(),
        "messages.parquet": columns.getvalue(),
    }
    template = {"data.prompt-template": "chat"}
    found = {name: trained(tmp_path, name, content, **template) for name, content in forms.items()}
    monkeypatch.setattr(large, "STORED_BYTES", 0)
    found["stored"] = trained(tmp_path, "again.jsonl", forms["messages.jsonl"], **template)
    assert len(set(found.values())) == 1
    first = [{"messages": said[:3]} for said in conversations("role", "content")]
    assert trained(tmp_path, "first.jsonl", lines(first), **template) not in found.values()
