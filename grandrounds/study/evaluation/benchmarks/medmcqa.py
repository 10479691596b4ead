"""MedMCQA: Indian medical entrance examinations, validation split of 4,183 questions.

Pal et al. (2022), "MedMCQA: a large-scale multi-subject multi-choice dataset for medical domain
question answering", CHIL. FlowerTune uses the same split
(https://github.com/adap/flower/blob/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical/benchmarks.py);
the test split has no published answers (`cop` = -1).
"""

from __future__ import annotations

from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row

INSTRUCTION = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines."
)
"""FlowerTune's instruction for entrance exams, after Meditron's `evaluation/instructions.json`."""


def _read(row: Row) -> Item:
    return Item(
        row=row.number,
        question=row.text("question"),
        options=tuple(row.text(column) for column in ("opa", "opb", "opc", "opd")),
        gold_index=row.position("cop", (0, 1, 2, 3)),
    )


BENCHMARK = Benchmark(
    name="medmcqa",
    title="MedMCQA",
    expected_items=4183,
    instruction=INSTRUCTION,
    read=_read,
    hub_name="openlifescienceai/medmcqa",
    hub_split="validation",
)
