"""Turns the rows of a site into clean examples, split into training and held-out ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from grandrounds.data.conversations import Turn
from grandrounds.data.forms import APART
from grandrounds.data.partitioning import Partition, check_column
from grandrounds.data.rows import Rows
from grandrounds.errors import DataError


@dataclass(frozen=True)
class Example:
    """A question and its answer, both stripped and non-empty."""

    question: str
    answer: str
    """The text that is learned."""
    before: tuple[Turn, ...] = ()
    """What was said before the question."""
    parts: tuple[str, str] | None = field(default=None, compare=False)
    """Instruction and input, where the question is both, joined by a space."""

    @property
    def apart(self) -> tuple[str, str]:
        """The instruction, empty where there is none, and the question without it."""
        return self.parts or ("", self.question)


def example_of(
    question: str | None,
    answer: str | None,
    before: tuple[Turn, ...] = (),
    instruction: str | None = None,
) -> Example:
    """Return the example in a row; without question or answer it is empty there.

    Parameters
    ----------
    instruction
        What a template of one's own shows apart from the question. A row with one of the two has a
        question and no instruction.
    """
    parts = (instruction or "").strip(), (question or "").strip()
    whole = " ".join(filter(None, parts))
    return Example(whole, (answer or "").strip(), before, parts if all(parts) else None)


@dataclass(frozen=True)
class SiteReport:
    """Counts of a site's rows; `rows` is the sum of the other four.

    Truncated examples are counted at tokenisation.
    """

    rows: int
    """Rows of the site's partition."""
    empty_rows: int
    """Rows dropped because the question or the answer is blank."""
    duplicate_rows: int
    """Rows dropped because an earlier row of the site has the same question and answer."""
    train_examples: int
    """Training examples, at least 1."""
    held_out_examples: int
    """Examples for held-out loss, never trained on."""


@dataclass(frozen=True)
class SiteData:
    """The examples of one site."""

    train: tuple[Example, ...]
    """Training examples in the order of the partition."""
    held_out: tuple[Example, ...]
    """Held-out examples; none of their questions occurs in `train`."""
    report: SiteReport
    units: tuple[int, ...] = ()
    """Number of each training example's unit, from 0; empty: examples have no units."""


def split_rows(
    rows: Rows,
    partition: Partition,
    *,
    question_column: str,
    answer_column: str,
    held_out_fraction: float,
) -> SiteData:
    """Return the training and held-out examples in a site's rows.

    Questions and answers are stripped. Rows without a question or an answer are dropped, and so is
    every row that repeats an earlier one of the same site; both are counted.

    The number of held-out examples is `held_out_fraction` of all, rounded half to even, but at
    least 1. Rows with the same question stay on the same side: otherwise the held-out answer could
    be memorised from a duplicate. Questions are taken in an order drawn from the partition's seed
    and number, skipping any that would exceed that number; if every question has more rows than
    that, the first of those with the fewest rows is held out. A site with a single question holds
    nothing out. This applies within a site: another site may train on a question that this one
    holds out.

    Parameters
    ----------
    rows : Rows
        All rows of the site.
    partition
        The site; its seed and number determine which questions are held out.
    question_column, answer_column : str
        Columns with the text of questions and answers.
    held_out_fraction : float
        Share of the examples to hold out, from 0 (none) to below 1.

    Raises
    ------
    DataError
        If a column is missing, the fraction is out of range, or no training example is left.
    """
    if not 0 <= held_out_fraction < 1:
        raise DataError(
            f"data.held-out-fraction = {held_out_fraction:g}: a share from 0 to below 1 is needed."
        )
    check_column(rows, "data.question-column", question_column)
    check_column(rows, "data.answer-column", answer_column)
    read = examples_of(rows, question_column, answer_column)
    examples, empty_rows, duplicate_rows = _clean(read)
    held_out = _choose_held_out(examples, held_out_fraction, partition)
    report = SiteReport(
        rows=len(rows),
        empty_rows=empty_rows,
        duplicate_rows=duplicate_rows,
        train_examples=len(examples) - len(held_out),
        held_out_examples=len(held_out),
    )
    if report.train_examples == 0:
        raise DataError(
            f"site {partition.number} has no example to train on: of its {report.rows} rows "
            f"{report.empty_rows} have no question or no answer, {report.duplicate_rows} are "
            f"duplicates and {report.held_out_examples} are held out. Check data.question-column "
            "and data.answer-column, or lower data.held-out-fraction or data.num-partitions."
        )
    return SiteData(
        train=tuple(example for i, example in enumerate(examples) if i not in held_out),
        held_out=tuple(example for i, example in enumerate(examples) if i in held_out),
        report=report,
    )


def examples_of(rows: Rows, question_column: str, answer_column: str) -> Iterator[Example]:
    """Yield the example of each row; see `example_of`."""
    has_apart = APART in rows.column_names
    instructions = rows[APART] if has_apart else itertools.repeat("", len(rows))
    columns = rows[question_column], rows[answer_column], rows.histories, instructions
    return map(example_of, *columns)


def first_question(example: Example) -> str:
    """Return the question that begins an example's conversation, which may be its only one."""
    return next((said for role, said in example.before if role == "user"), example.question)


def _clean(read: Iterable[Example]) -> tuple[list[Example], int, int]:
    """Return the examples, the number of empty rows and the number of duplicates."""
    examples: dict[Example, None] = {}
    empty_rows = duplicate_rows = 0
    for example in read:
        if not example.question or not example.answer:
            empty_rows += 1
        elif example in examples:
            duplicate_rows += 1
        else:
            examples[example] = None
    return list(examples), empty_rows, duplicate_rows


def _choose_held_out(examples: list[Example], fraction: float, partition: Partition) -> set[int]:
    """Return the held-out positions, keeping rows with the same question together."""
    positions: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        positions.setdefault(first_question(example), []).append(position)
    if fraction == 0 or len(positions) < 2:
        return set()
    wanted = max(1, round(fraction * len(examples)))
    rng = np.random.default_rng([partition.seed, partition.number])
    groups = list(positions.values())
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    smallest: list[int] = min(shuffled, key=len)
    return held_out or set(smallest)
