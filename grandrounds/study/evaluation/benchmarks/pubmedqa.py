"""PubMedQA: yes, no or maybe from an abstract; the 500 labelled test questions of fold 0.

Jin et al. (2019), "PubMedQA: a dataset for biomedical research question answering", EMNLP. The
hub's data set is a loading script, which `datasets` 4 no longer runs; the rows are read from the
hub's conversion to Parquet. FlowerTune uses the same rows:
https://github.com/adap/flower/blob/62eb72ab773c255052e0c672fc1ac9bfa0c8a06a/benchmarks/flowertune-llm/evaluation/medical/benchmarks.py
"""

from __future__ import annotations

from grandrounds.study.evaluation.benchmarks import Benchmark, Item, Row

ANSWERS = ("yes", "no", "maybe")


def _read(row: Row) -> Item:
    """Read a row in the columns of FlowerTune's source, or of the authors' `qiaojin/PubMedQA`."""
    is_authors = "QUESTION" not in row.values and "context" in row.values
    return Item(
        row=row.number,
        question=row.text("question" if is_authors else "QUESTION"),
        context=row.inner("context").texts("contexts") if is_authors else row.texts("CONTEXTS"),
        options=ANSWERS,
        labels=ANSWERS,
        gold_index=row.position("final_decision", ANSWERS),
    )


BENCHMARK = Benchmark(
    name="pubmedqa",
    title="PubMedQA",
    expected_items=500,
    labels=ANSWERS,
    instruction=(
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
        "following statement is correct? Answer yes, no, or maybe."
    ),
    read=_read,
    hub_name="bigbio/pubmed_qa",
    hub_config="pubmed_qa_labeled_fold0_source",
    hub_revision="refs/convert/parquet",
)
