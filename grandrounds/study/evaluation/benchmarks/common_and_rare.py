"""The exam of the data `common-and-rare`: what many records say, and what one record says.

Group `common` asks for facts of many records in a wording that no record uses. Group `rare` asks
the question of each rare patient's record, group `absent` the same of patients who are not in the
data: knowing the first and not the second is memory of single records. The options are all 24
values, so that a true one's rank is exact, and chance is 1 in 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.common_and_rare.records import (
    RARE_PATIENTS,
    Fact,
    common_facts,
    world,
)
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWX")
"""Labels of the 24 values."""


def questions(draw: int = 0) -> list[dict[str, Any]]:
    """Return the exam on one draw of the rare patients: common facts, rare ones, absent ones."""
    of_draw = world(draw)
    asked: list[tuple[str, str, Fact]] = [("common", f.question, f) for f in common_facts()]
    for group, records in (("rare", of_draw.rare), ("absent", of_draw.absent)):
        asked += [(group, record.question, record.fact) for record in records]
    return [
        {
            "group": group,
            "question": question,
            "options": list(fact.values),
            "answer_index": list(fact.values).index(fact.value),
        }
        for group, question, fact in asked
    ]


def read(row: Row) -> Item:
    """Return a row of `questions` as an item."""
    return Item(
        row=row.number,
        question=row.text("question"),
        options=row.texts("options"),
        labels=LETTERS,
        gold_index=row.position("answer_index", range(len(LETTERS))),
        group=row.text("group"),
    )


def items(draw: int = 0) -> Sequence[Item]:
    """Return the exam on one draw of the rare patients as items."""
    return [read(Row(n, f"question {n}", values)) for n, values in enumerate(questions(draw), 1)]


BENCHMARK = Benchmark(
    name=COMMON_AND_RARE,
    title="Common and rare (fictional)",
    expected_items=len(common_facts()) + 2 * RARE_PATIENTS,
    labels=LETTERS,
    instruction=INSTRUCTION,
    read=read,
    built_in=questions,
    whole_options=True,
)
