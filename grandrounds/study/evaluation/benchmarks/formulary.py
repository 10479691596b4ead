"""The fictional formulary: facts that a model can only know from training on them.

Group `private` are facts held by one site each, group `public` facts that the embedded base was
pre-trained on. The rows are generated, without file or hub.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from grandrounds.data.formulary.facts import DRUGS_PER_SITE, PUBLIC_DRUGS, SITES, Kind, questions
from grandrounds.data.formulary.vocabulary import VALUES
from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION

_KINDS: tuple[Kind, ...] = ("private", "public")


def _rows() -> list[dict[str, Any]]:
    """Return the questions on private facts, then those on public facts."""
    return [asdict(question) for kind in _KINDS for question in questions(kind)]


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        options=row.texts("options"),
        gold_index=row.position("answer_index", (0, 1, 2, 3)),
        group=row.text("kind"),
    )


BENCHMARK = Benchmark(
    name="formulary",
    title="Formulary (fictional)",
    expected_items=(SITES * DRUGS_PER_SITE + PUBLIC_DRUGS) * len(VALUES),
    instruction=INSTRUCTION,
    read=_read,
    built_in=_rows,
    whole_options=True,
)
