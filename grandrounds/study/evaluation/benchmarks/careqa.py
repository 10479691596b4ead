"""CareQA (English): entrance exams to specialised healthcare training in Spain, 5,621 questions.

Arias-Duart et al. (2025), "Automatic evaluation of healthcare LLMs beyond question-answering".
Its `cop` is 1-based, MedMCQA's is 0-based. FlowerTune uses MedMCQA's instruction:
https://github.com/adap/flower/blob/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical/benchmarks.py
"""

from __future__ import annotations

from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row
from grandrounds.study.evaluation.benchmarks.medmcqa import INSTRUCTION


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        options=tuple(row.text(column) for column in ("op1", "op2", "op3", "op4")),
        gold_index=row.position("cop", (1, 2, 3, 4)),
    )


BENCHMARK = Benchmark(
    name="careqa",
    title="CareQA (English)",
    expected_items=5621,
    instruction=INSTRUCTION,
    read=_read,
    hub_name="HPAI-BSC/CareQA",
    hub_config="CareQA_en",
)
