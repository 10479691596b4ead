"""Protocol `likelihood` against the real lm-evaluation-harness, on the same real questions."""

from __future__ import annotations

import gzip
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grandrounds.study.evaluation.benchmarks import Item, get_benchmark, load_items
from grandrounds.study.evaluation.likelihood import (
    answer_items,
    answer_texts,
    build_prompt,
    context_length,
)
from tests.places import SHARED

DATA = SHARED / "eval"
COUNT = 200

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of imports of its own, which are no concern here
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")

TASKS = {
    "pubmedqa": ("pubmedqa", "pubmedqa/pubmedqa.yaml"),
    "medqa": ("medqa_4options", "medqa/medqa.yaml"),
    "medmcqa": ("medmcqa", "medmcqa/medmcqa.yaml"),
    "careqa": ("careqa_en", "careqa/careqa_en.yaml"),
}
"""Benchmark → the harness's name for it, and where its definition is."""


def published_rows(name: str) -> list[dict[str, Any]]:
    """Return the first rows of a benchmark's file, in the columns that the harness's task reads."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(COUNT), file, strict=False)]
    if name != "medqa":
        return rows
    return [
        {
            "sent1": row["question"],
            **{f"ending{i}": option["value"] for i, option in enumerate(row["options"])},
            "label": "ABCD".index(row["answer_idx"]),
        }
        for row in rows
    ]


def invented_rows() -> list[dict[str, Any]]:
    """Return rows in CareQA's columns; the real ones are not to be had offline."""
    return [
        {"question": f"Which of {i} is it?", "cop": 1 + i % 4}
        | {f"op{k}": f"number {i * k}" for k in range(1, 5)}
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Let the harness's own warnings be warnings, and its log be silent."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def harness_task(name: str, rows: list[dict[str, Any]]) -> Any:
    """Return the harness's own task, with the given rows in place of its download."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def given(self: Any, *_: Any, **__: Any) -> None:
        self.dataset = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))

    definition = Path(lm_eval.tasks.__file__).parent / TASKS[name][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigurableTask, "download", given)
        return lm_eval.tasks.TaskManager(include_defaults=False).load([str(definition)])


def harness_samples(name: str, rows: list[dict[str, Any]], base: tuple[Any, Any]) -> list[Any]:
    """Return what the harness recorded for every item, in the order of the rows."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = base
    task = harness_task(name, rows)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    assert harness.max_length == context_length(model.config) == 1024
    found = evaluate(harness, task, bootstrap_iters=0, log_samples=True)
    samples = found["samples"][TASKS[name][0]]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def compare(name: str, items: tuple[Item, ...], samples: list[Any], base: tuple[Any, Any]) -> int:
    """Compare prompts, likelihoods and answers; return how many prompts were cut."""
    benchmark = get_benchmark(name)
    answers = answer_items(*base, benchmark, items)
    assert len(answers) == len(samples) == len(items)
    for item, answer, sample in zip(items, answers, samples, strict=True):
        arguments = list(sample["arguments"])
        asked = [tuple(pair) for pair in arguments]
        prompt = build_prompt(benchmark, item)
        assert asked == [(prompt, f" {text}") for text in answer_texts(benchmark, item)]
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert answer.log_likelihoods == pytest.approx(theirs, abs=1e-4, rel=0)
        assert answer.choice == theirs.index(max(theirs))
        assert answer.correct == bool(sample["acc"])
        if "acc_norm" in sample:
            assert answer.correct_normalised == bool(sample["acc_norm"])
    return sum(answer.truncated for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pubmedqa", "medqa", "medmcqa"])
def test_likelihoods_and_answers_are_the_harness_s(
    name: str, base: tuple[Any, Any], quiet: None
) -> None:
    rows = published_rows(name)
    items = load_items(get_benchmark(name), DATA)[:COUNT]
    cut = compare(name, items, harness_samples(name, rows, base), base)
    assert len(items) == COUNT
    assert (cut > 0) == (name == "pubmedqa")


def test_careqa_is_asked_as_by_the_harness(
    base: tuple[Any, Any], quiet: None, tmp_path: Path
) -> None:
    rows = invented_rows()
    (tmp_path / "careqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_items(get_benchmark("careqa"), tmp_path)
    assert compare("careqa", items, harness_samples("careqa", rows, base), base) == 0
