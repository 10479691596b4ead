"""General knowledge: what a base knew before it was trained, so that a lower value is forgetting.

40 short questions written for this project, without file or hub.
"""

from __future__ import annotations

from typing import Any

from grandrounds.data.general import QUESTIONS, shown_options
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION


def _rows() -> list[dict[str, Any]]:
    """Return the questions, the true option in each place equally often."""
    shown = [shown_options(number, question) for number, question in enumerate(QUESTIONS)]
    return [
        {"question": question.question, "options": options, "answer_index": place}
        for question, (options, place) in zip(QUESTIONS, shown, strict=True)
    ]


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        options=row.texts("options"),
        gold_index=row.position("answer_index", (0, 1, 2, 3)),
    )


BENCHMARK = Benchmark(
    name="general",
    title="General knowledge",
    expected_items=len(QUESTIONS),
    instruction=INSTRUCTION,
    read=_read,
    built_in=_rows,
    whole_options=True,
)
