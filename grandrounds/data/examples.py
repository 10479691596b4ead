"""Turns the rows of a site into examples: cleaned, and split into training and held-out ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grandrounds.data.partitioning import partition_rows
from grandrounds.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Example:
    """One question with its answer, both without blanks around them."""

    question: str
    """What is asked; never empty."""
    answer: str
    """What is learned; never empty."""


@dataclass(frozen=True)
class SiteReport:
    """What became of a site's rows: `rows` is the sum of the other four.

    Examples cut to the context length are counted later, where text becomes tokens.
    """

    rows: int
    """Rows of the site's partition."""
    empty_rows: int
    """Rows dropped because the question or the answer is empty or blank."""
    duplicate_rows: int
    """Rows dropped because an earlier row of the site has the same question and answer."""
    train_examples: int
    """Examples to train on; at least 1."""
    held_out_examples: int
    """Examples never trained on, for held-out loss."""


@dataclass(frozen=True)
class SiteData:
    """The examples of one site."""

    train: tuple[Example, ...]
    """Examples to train on, in the order of the partition."""
    held_out: tuple[Example, ...]
    """Examples never trained on; no question of theirs occurs in `train`."""
    report: SiteReport
    """What became of the site's rows."""


def site_data(
    rows: Dataset,
    *,
    partitioner: str,
    num_partitions: int,
    partition_id: int,
    seed: int,
    held_out_fraction: float,
    question_column: str,
    answer_column: str,
    partition_by: str = "",
    dirichlet_alpha: float = 0.5,
    drop_duplicates: bool = True,
) -> SiteData:
    """Return the training and held-out examples of one site of a divided source: the rows that
    `partition_rows` gives it, split by `split_rows`.

    Raises
    ------
    DataError
        As these two.
    """
    partition = partition_rows(
        rows,
        partitioner=partitioner,
        num_partitions=num_partitions,
        partition_id=partition_id,
        seed=seed,
        partition_by=partition_by,
        dirichlet_alpha=dirichlet_alpha,
    )
    return split_rows(
        partition,
        partition_id=partition_id,
        seed=seed,
        held_out_fraction=held_out_fraction,
        question_column=question_column,
        answer_column=answer_column,
        drop_duplicates=drop_duplicates,
    )


def split_rows(
    partition: Dataset,
    *,
    partition_id: int,
    seed: int,
    held_out_fraction: float,
    question_column: str,
    answer_column: str,
    drop_duplicates: bool = True,
) -> SiteData:
    """Return the training and held-out examples in a site's rows, and what became of the rows.

    Blanks around questions and answers are removed. Rows without question or answer are dropped,
    and so is every row that repeats an earlier one of the same site; both are counted.

    The number held out is `held_out_fraction` of the examples, rounded (halves to even), but at
    least 1. Rows that ask the same question stay together on one side: otherwise the held-out
    answer could be learned by heart from its twin. Questions are taken in an order drawn from
    (seed, partition_id), those passed over that would exceed the number; if every question has
    more rows than that, the first of those with fewest rows is held out. A site with a single
    question holds nothing out. The rule holds within a site: another site may train on a question
    that this one holds out.

    Parameters
    ----------
    partition : datasets.Dataset
        All rows of the site.
    partition_id, seed : int
        Decide which questions are held out.
    held_out_fraction : float
        Share of the examples to hold out, from 0 (none) to below 1.
    question_column, answer_column : str
        Columns with the text of questions and answers.
    drop_duplicates : bool
        Whether rows that repeat an earlier one are dropped.

    Raises
    ------
    DataError
        If a column is missing, the fraction is out of its range, or no example is left to train on.
    """
    if not 0 <= held_out_fraction < 1:
        raise DataError(
            f"data.held-out-fraction = {held_out_fraction:g}: a share from 0 to below 1 is needed."
        )
    for key, column in (("question", question_column), ("answer", answer_column)):
        if column not in partition.column_names:
            raise DataError(
                f"data.{key}-column = {column!r}: there is no such column, only: "
                f"{', '.join(partition.column_names)}.{nearest(column, partition.column_names)}"
            )
    texts = zip(partition[question_column][:], partition[answer_column][:], strict=True)
    examples, empty_rows, duplicate_rows = _clean(texts, drop_duplicates)
    held_out = _choose_held_out(examples, held_out_fraction, seed, partition_id)
    report = SiteReport(
        rows=len(partition),
        empty_rows=empty_rows,
        duplicate_rows=duplicate_rows,
        train_examples=len(examples) - len(held_out),
        held_out_examples=len(held_out),
    )
    _check_trainable(report, partition_id)
    return SiteData(
        train=tuple(example for i, example in enumerate(examples) if i not in held_out),
        held_out=tuple(example for i, example in enumerate(examples) if i in held_out),
        report=report,
    )


def _clean(
    texts: Iterable[tuple[str | None, str | None]], drop_duplicates: bool
) -> tuple[list[Example], int, int]:
    """Return the examples, the number of empty rows and the number of repeated rows."""
    examples: list[Example] = []
    seen: set[Example] = set()
    empty_rows = duplicate_rows = 0
    for question, answer in texts:
        example = Example((question or "").strip(), (answer or "").strip())
        if not example.question or not example.answer:
            empty_rows += 1
        elif drop_duplicates and example in seen:
            duplicate_rows += 1
        else:
            seen.add(example)
            examples.append(example)
    return examples, empty_rows, duplicate_rows


def _choose_held_out(
    examples: list[Example], fraction: float, seed: int, partition_id: int
) -> set[int]:
    """Return the positions of the held-out examples, whole questions at a time."""
    positions: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        positions.setdefault(example.question, []).append(position)
    if fraction == 0 or len(positions) < 2:
        return set()
    wanted = max(1, round(fraction * len(examples)))
    order = np.random.default_rng([seed, partition_id]).permutation(len(positions))
    groups = list(positions.values())
    drawn = [groups[i] for i in order]
    held_out: set[int] = set()
    for group in drawn:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:
        smallest: list[int] = min(drawn, key=len)
        held_out.update(smallest)
    return held_out


def _check_trainable(report: SiteReport, partition_id: int) -> None:
    if report.train_examples == 0:
        raise DataError(
            f"site {partition_id} has no example to train on: of its {report.rows} rows "
            f"{report.empty_rows} have no question or no answer, {report.duplicate_rows} are "
            f"duplicates and {report.held_out_examples} are held out. Check data.question-column "
            "and data.answer-column, or lower data.held-out-fraction or data.num-partitions."
        )
