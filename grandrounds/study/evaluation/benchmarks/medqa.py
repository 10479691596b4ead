"""MedQA: United States Medical Licensing Examination, four options, test split of 1,273 questions.

Jin et al. (2021), "What disease does this patient have? A large-scale open domain question
answering dataset from medical exams", Applied Sciences 11. Two data sets on the hub have the same
rows: `options` is a list of `key` and `value` in `bigbio/med_qa`, which FlowerTune uses, and maps
letters to texts in `GBaker/MedQA-USMLE-4-options`, which needs no loading script. Both formats are
read. FlowerTune's instruction names A to E, although there are four options:
https://github.com/adap/flower/blob/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical/benchmarks.py
"""

from __future__ import annotations

from grandrounds.study.evaluation.benchmarks import LETTERS, Benchmark, Item, Row


def _options(row: Row) -> tuple[str, ...]:
    """Return the texts of options A to D, from either of the two formats."""
    options = row.value("options")
    pairs: list[tuple[object, object]] = []
    if isinstance(options, dict):
        pairs = list(options.items())
    elif isinstance(options, list) and all(isinstance(option, dict) for option in options):
        pairs = [(option.get("key"), option.get("value")) for option in options]
    texts = tuple(text for _, text in pairs if isinstance(text, str))
    if tuple(key for key, _ in pairs) != LETTERS or len(texts) != len(LETTERS):
        raise row.refused("options", "one string for each of A, B, C, D, in this order")
    return texts


def _read(row: Row) -> Item:
    """Read a row: the first option whose text is `answer` is correct; `answer_idx` must agree."""
    options = _options(row)
    answer = row.text("answer")
    if answer not in options:
        raise row.refused("answer", "the text of one of the options")
    if "answer_idx" in row.values and options[row.position("answer_idx", LETTERS)] != answer:
        allowed = LETTERS[options.index(answer)]
        raise row.refused("answer_idx", f"{allowed}, the option whose text is `answer`")
    return Item(
        row=row.number,
        question=row.text("question"),
        options=options,
        gold_index=options.index(answer),
    )


BENCHMARK = Benchmark(
    name="medqa",
    title="MedQA (USMLE, 4 options)",
    expected_items=1273,
    instruction=(
        "You are a medical doctor taking the US Medical Licensing Examination. You need to "
        "demonstrate your understanding of basic and clinical science, medical knowledge, and "
        "mechanisms underlying health, disease, patient care, and modes of therapy. Show your "
        "ability to apply the knowledge essential for medical practice. For the following "
        "multiple-choice question, select one correct answer from A to E. Base your answer on the "
        "current and standard practices referenced in medical guidelines."
    ),
    read=_read,
    hub_name="GBaker/MedQA-USMLE-4-options",
)
