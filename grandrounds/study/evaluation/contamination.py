"""Counts the items of benchmarks that occur in training data, and lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grandrounds.data.sources import load_rows
from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items, source_of
from grandrounds.study.evaluation.overlap import find_overlap

THRESHOLD = 0.8
"""Least Jaccard similarity of a near-duplicate."""


def check_overlap(
    training: str,
    benchmarks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    question_column: str = "input",
    answer_column: str = "output",
) -> dict[str, Any]:
    """Look for every question of some benchmarks in training data.

    Parameters
    ----------
    training : str
        What `grandrounds.data.sources.load_rows` takes: a local file, a hub name or `formulary`.
    benchmarks : sequence of str
        Names of `grandrounds.study.evaluation.benchmarks`.
    data : Path, optional
        Folder with the benchmarks' files.
    limit : int, optional
        Look for the first so many items of each benchmark only.
    question_column, answer_column : str
        Columns of the training data; each is searched by itself.

    Returns
    -------
    dict
        `training`, `rows`, `threshold`, and `benchmarks`: name → n, items (with an overlap of any
        kind), exact, near, source, and found: one object for each pair.
    """
    known = [get_benchmark(name) for name in dict.fromkeys(benchmarks)]
    asked = [(b, load_items(b, data, limit), source_of(b, data)) for b in known]
    rows = load_rows(training, question_column=question_column, answer_column=answer_column)
    questions, answers = list(rows[question_column]), list(rows[answer_column])
    texts = [*questions, *answers]
    report = {}
    for benchmark, items, source in asked:
        found = find_overlap([item.question for item in items], texts, threshold=THRESHOLD)
        pairs = [
            {
                "item": items[overlap.item].row,
                "training_row": overlap.row % len(questions) + 1,
                "column": question_column if overlap.row < len(questions) else answer_column,
                "kind": overlap.kind,
                "similarity": round(overlap.similarity, 4),
                "question": overlap.question,
                "training_text": overlap.training_text[:500],
            }
            for overlap in found
        ]
        exact = {pair["item"] for pair in pairs if pair["kind"] == "exact"}
        either = {pair["item"] for pair in pairs}
        report[benchmark.name] = {
            "n": len(items),
            "items": len(either),
            "exact": len(exact),
            "near": len(either - exact),
            "source": source,
            "found": pairs,
        }
    joined = "\x00".join(texts)
    return {
        "training": training,
        "rows": len(questions),
        "texts_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        "threshold": THRESHOLD,
        "benchmarks": report,
    }
