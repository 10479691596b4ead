"""CareQA in English: access exams of Spanish specialised health care, 5,621 questions.

Arias-Duart et al. (2025), "Automatic evaluation of healthcare LLMs beyond question-answering".
Unlike MedMCQA's, its `cop` counts from 1. FlowerTune gives it MedMCQA's instruction:
https://github.com/adap/flower/blob/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical/benchmarks.py
"""

from __future__ import annotations

from grandrounds.study.evaluation.benchmarks import LETTERS, Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        context=(),
        options=tuple(row.text(column) for column in ("op1", "op2", "op3", "op4")),
        labels=LETTERS,
        gold_index=row.position("cop", (1, 2, 3, 4)),
        group="",
    )


BENCHMARK = Benchmark(
    name="careqa",
    title="CareQA (English)",
    expected_items=5621,
    labels=LETTERS,
    instruction=INSTRUCTION,
    read=_read,
    stem="careqa",
    hub_name="HPAI-BSC/CareQA",
    hub_config="CareQA_en",
    hub_split="test",
    hub_revision=None,
    built_in=None,
)
