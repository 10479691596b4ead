"""The fictional formulary: facts that no model can know unless a federation taught them.

Group `private` holds what only single sites know; group `public`, what the small base model was
pre-trained on. Neither file nor hub is needed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from grandrounds.data.formulary.facts import DRUGS_PER_SITE, PUBLIC_DRUGS, SITES, Kind, questions
from grandrounds.data.formulary.vocabulary import VALUES
from grandrounds.study.evaluation.benchmarks import LETTERS, Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION

_KINDS: tuple[Kind, ...] = ("private", "public")


def _rows() -> list[dict[str, Any]]:
    """Return the exam on private facts, then the one on public facts."""
    return [asdict(question) for kind in _KINDS for question in questions(kind)]


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        context=(),
        options=row.texts("options"),
        labels=LETTERS,
        gold_index=row.position("answer_index", (0, 1, 2, 3)),
        group=row.text("kind"),
    )


BENCHMARK = Benchmark(
    name="formulary",
    title="Formulary (fictional)",
    expected_items=(SITES * DRUGS_PER_SITE + PUBLIC_DRUGS) * len(VALUES),
    labels=LETTERS,
    instruction=INSTRUCTION,
    read=_read,
    stem="formulary",
    hub_name=None,
    hub_config=None,
    hub_split="",
    hub_revision=None,
    built_in=_rows,
)
