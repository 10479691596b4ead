"""Turns the rows of a site into clean examples, split into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from grandrounds.data.conversations import Turn
from grandrounds.data.partitioning import Partition, check_column
from grandrounds.data.rows import Rows
from grandrounds.errors import DataError

DIGEST_BYTES = 16
"""Two of 10^8 texts are taken for equal with a probability of 10^-22."""

Digests = NDArray[np.uint8]
"""One for each of some examples, of (examples, `DIGEST_BYTES`)."""

_NO_DIGESTS: Digests = np.zeros((0, DIGEST_BYTES), np.uint8)


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
    rejected: str = ""
    """Of a preference, the answer that `answer` is preferred to; empty for any other example."""

    @property
    def apart(self) -> tuple[str, str]:
        """The instruction, empty where there is none, and the question without it."""
        return self.parts or ("", self.question)


def example_of(
    question: str | None,
    answer: str | None,
    before: tuple[Turn, ...] = (),
    instruction: str | None = None,
    rejected: str | None = None,
) -> Example:
    """Return the example in a row; without question or answer it is empty there.

    Parameters
    ----------
    instruction
        What a template of one's own shows apart from the question. A row with one of the two has a
        question and no instruction.
    rejected
        The other answer of a preference.
    """
    parts = (instruction or "").strip(), (question or "").strip()
    whole = " ".join(filter(None, parts))
    apart = parts if all(parts) else None
    return Example(whole, (answer or "").strip(), before, apart, (rejected or "").strip())


class Examples(Sequence[Example]):
    """Rows as examples, each made when it is asked for."""

    def __init__(
        self,
        rows: Rows,
        columns: tuple[str, str],
        positions: NDArray[np.int64] | None = None,
        digests: Digests | None = None,
    ) -> None:
        """Take some rows, by default all.

        Parameters
        ----------
        columns
            Of the question and of the answer.
        digests
            Of what the examples say, where they are known.
        """
        self._rows, self._columns = rows, columns
        self._read = rows.reader(columns)
        self._positions = np.arange(len(rows)) if positions is None else positions
        self.digests: Digests = _NO_DIGESTS if digests is None else digests

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, place: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(place, slice):
            return tuple(map(self._example, self._positions[place]))
        return self._example(self._positions[place])

    def _example(self, row: np.int64) -> Example:
        return example_of(*self._read(int(row)))

    def select(self, positions: NDArray[np.int64], digests: Digests) -> Sequence[Example]:
        """Return some of them: in memory unless their rows are stored."""
        chosen = Examples(self._rows, self._columns, self._positions[positions], digests)
        return chosen if self._rows.is_stored else tuple(chosen)


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

    train: Sequence[Example]
    """Training examples in the order of the partition."""
    held_out: Sequence[Example]
    """Held-out examples; none of their questions occurs in `train`."""
    report: SiteReport
    units: tuple[int, ...] = ()
    """Number of each training example's unit, from 0; empty: examples have no units."""
    held_out_rows: tuple[int, ...] = ()
    """Position of each held-out example among the site's rows; empty: divided by units."""


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
    every = Examples(rows, (question_column, answer_column))
    kept, digests, empty_rows, questions = _cleaned(every)
    is_held_out = _chosen_to_hold_out(questions, held_out_fraction, partition)
    held_out_examples = int(is_held_out.sum())
    report = SiteReport(
        rows=len(rows),
        empty_rows=empty_rows,
        duplicate_rows=len(rows) - empty_rows - len(kept),
        train_examples=len(kept) - held_out_examples,
        held_out_examples=held_out_examples,
    )
    if report.train_examples == 0:
        raise DataError(
            f"site {partition.number} has no example to train on: of its {report.rows} rows "
            f"{report.empty_rows} have no question or no answer, {report.duplicate_rows} are "
            f"duplicates and {report.held_out_examples} are held out. Check data.question-column "
            "and data.answer-column, or lower data.held-out-fraction or data.num-partitions."
        )
    return SiteData(
        train=every.select(kept[~is_held_out], digests[~is_held_out]),
        held_out=every.select(kept[is_held_out], digests[is_held_out]),
        report=report,
        held_out_rows=tuple(kept[is_held_out].tolist()),
    )


def examples_of(rows: Rows, question_column: str, answer_column: str) -> Sequence[Example]:
    """Return the example of each row; see `example_of`."""
    return Examples(rows, (question_column, answer_column))


def first_question(example: Example) -> str:
    """Return the question that begins an example's conversation, which may be its only one."""
    return next((said for role, said in example.before if role == "user"), example.question)


def _cleaned(
    examples: Sequence[Example],
) -> tuple[NDArray[np.int64], Digests, int, NDArray[np.int64]]:
    """Return the positions of examples, their digests, the number of empty rows, and the examples'
    questions.

    Of equal ones the first is kept. Questions are numbers, from 0, by first occurrence.
    """
    texts, questions = (bytearray(DIGEST_BYTES * len(examples)) for _ in range(2))
    is_full = np.zeros(len(examples), bool)
    for position, example in enumerate(examples):
        asked, answer, before = example.question, example.answer, example.before
        if asked and answer:
            is_full[position] = True
            place = slice(position * DIGEST_BYTES, (position + 1) * DIGEST_BYTES)
            earlier = repr(before) if before else ""
            other = f"{len(example.rejected)} {example.rejected}" if example.rejected else ""
            texts[place] = _digest(f"{len(asked)} {len(answer)} {asked}{answer}{earlier}{other}")
            questions[place] = _digest(first_question(example))
    full = np.flatnonzero(is_full)
    of_texts, of_questions = (
        np.frombuffer(found, np.uint8).reshape(-1, DIGEST_BYTES)[full]
        for found in (texts, questions)
    )
    _, first = _numbered(of_texts)
    numbers, _ = _numbered(of_questions[first])
    return full[first], of_texts[first], len(examples) - len(full), numbers


def _digest(text: str) -> bytes:
    """Return a digest of a text, which takes less memory than it does."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _numbered(digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each digest's number, from 0 by first occurrence, and where each occurs first."""
    if not len(digests):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    halves = digests.view(np.uint64)  # (digests, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first comes first
    is_new = np.r_[True, (halves[order[1:]] != halves[order[:-1]]).any(1)]
    first = order[is_new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(len(digests), np.int64)
    numbers[order] = rank[np.cumsum(is_new) - 1]
    return numbers, np.sort(first)


def _chosen_to_hold_out(
    questions: NDArray[np.int64], fraction: float, partition: Partition
) -> NDArray[np.bool_]:
    """Return which examples are held out, those with the same question together.

    Parameters
    ----------
    questions
        The number of each example's question, from 0.
    """
    sizes = np.bincount(questions)
    is_chosen = np.zeros(len(sizes), bool)
    if fraction == 0 or len(sizes) < 2:
        return is_chosen[questions]
    wanted = max(1, round(fraction * len(questions)))
    shuffled = np.random.default_rng([partition.seed, partition.number]).permutation(len(sizes))
    left = wanted
    for question in shuffled:
        if sizes[question] <= left:
            is_chosen[question] = True
            left -= sizes[question]
        if not left:
            break
    if left == wanted:
        is_chosen[shuffled[np.argmin(sizes[shuffled])]] = True
    return is_chosen[questions]
