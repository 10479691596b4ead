"""Counts what a local file holds, in a second: no `datasets`, no torch.

Its rows are read and checked exactly as a run reads them, so that a wrong column is told at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

from grandrounds.data.conversations import PLAIN_TEXT
from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.files import RawRows, from_records
from grandrounds.data.forms import APART, INSTRUCTION
from grandrounds.data.own_prompt import columns_apart
from grandrounds.data.pairs import Pairs, columns_of_pairs, pairs_of
from grandrounds.data.places import (
    FILE_ENDINGS,
    SURVEYED_BYTES,
    OnHub,
    Version,
    files_of,
    looks_like_path,
)
from grandrounds.data.read import as_read, columns_read
from grandrounds.data.sources import read_files, read_pairs
from grandrounds.errors import DataError


@dataclass(frozen=True)
class Survey:
    """The rows of a data source, counted."""

    rows: int
    usable: int
    """Rows with a question and an answer, duplicates included."""
    usable_by_label: Mapping[Any, int]
    """Value of the partition column → usable rows, for every value; empty without a column."""
    unlabelled: int
    """Rows without a value in the partition column."""
    form: str = ""
    """The form of the data in words; empty for a column of questions and one of answers."""
    conversations: int = 0
    """Usable rows with something said before the question."""
    left_out: tuple[str, ...] = ()
    """Conversations that cannot be trained on, each with its place and the reason."""
    unread: tuple[str, ...] = ()
    """Columns that nobody reads."""
    has_instructions: bool = False
    """Whether there is a column of instructions."""
    texts: int = 0
    """Usable rows of plain text."""
    with_system_only: int = 0
    """Those of `conversations` that have a system prompt before the question and nothing else."""
    are_pairs: bool = False
    """Whether the rows are preferences."""


def survey(
    source: str,
    question: str,
    answer: str,
    partition_by: str = "",
    template: str = "",
    rejected: str = "",
) -> Survey | None:
    """Return what a data source holds; None for a hub data set and a file that is too large.

    Parameters
    ----------
    question, answer, partition_by : str
        Columns; `partition_by` is empty if there is none.
    template : str
        `data.prompt-template`: one of one's own may show instructions apart from questions.
    rejected : str
        Column of rejected answers; empty unless the run trains on preferences.

    Raises
    ------
    DataError
        If a name can be no data set of the hub, or a local file does not exist, cannot be read,
        lacks a column or has no row with a question and an answer.
    """
    labels = (partition_by,) if partition_by else ()
    columns = (question, answer, *labels, *columns_apart(template))
    if rejected:
        columns = (question, answer, rejected, *labels)
    if source in EMBEDDED:
        return _survey_embedded(source, columns, bool(rejected))
    if not looks_like_path(source):
        for ending in FILE_ENDINGS:
            if Path(source + ending).is_file():
                raise DataError(
                    f"{source}: no such file. Did you mean '{source}{ending}'? A name without an "
                    "ending is a data set on the Hugging Face hub."
                )
        OnHub.of(source)
        return None
    version = files_of(source)
    size = sum(size_bytes for _, _, size_bytes in version)
    if size > SURVEYED_BYTES:
        return None
    return _survey_files(source, version, columns, bool(rejected))


@lru_cache(maxsize=4)
def _survey_embedded(source: str, columns: tuple[str, ...], are_pairs: bool) -> Survey:
    choose = columns_of_pairs(columns) if are_pairs else columns_read(columns)
    raw = from_records(enumerate(embedded_rows(source), 1), choose, "row")
    return (_counted_pairs if are_pairs else _counted)(raw, source, columns)


@lru_cache(maxsize=4)
def _survey_files(
    source: str, version: Version, columns: tuple[str, ...], are_pairs: bool
) -> Survey:
    """Survey files; their version is part of the cache key, so that changed ones are read again."""
    if are_pairs:
        return _counted_pairs(read_pairs(source, version, columns), source, columns)
    return _counted(read_files(source, version, columns), source, columns)


def _counted_pairs(raw: RawRows, source: str, columns: tuple[str, ...]) -> Survey:
    found: Pairs = pairs_of(raw, source, columns)
    is_usable = [bool(pair.question) for pair in found.preferences]
    by_label, gaps = _by_label(next(iter(found.labels.values()), []), is_usable)
    before = list(filter(None, found.histories))
    return Survey(
        len(is_usable),
        sum(is_usable),
        by_label,
        gaps,
        conversations=len(before),
        left_out=found.left_out,
        unread=tuple(name for name in raw.available if name not in found.columns),
        with_system_only=sum(len(b) == 1 and b[0][0] == "system" for b in before),
        are_pairs=True,
    )


def _by_label(labels: Sequence[Any], is_usable: Sequence[bool]) -> tuple[dict[Any, int], int]:
    """Return the usable rows of each label, and the number of rows without one."""
    found: Counter[Any] = Counter()
    for label, usable in zip(labels, is_usable, strict=False):
        if label is not None and str(label).strip():
            found[label] += usable
    return dict(found), sum(label is None or not str(label).strip() for label in labels)


def _counted(raw: RawRows, source: str, columns: tuple[str, ...]) -> Survey:
    read = as_read(raw, source, columns)
    values, (question, answer) = read.values, columns[:2]
    apart = values.get(APART, repeat(""))
    is_usable = [
        bool((asked.strip() or instruction.strip()) and answered.strip())
        for asked, answered, instruction in zip(
            values[question], values[answer], apart, strict=False
        )
    ]
    if not any(is_usable):
        if read.left_out:
            raise DataError(
                f"{source}: none of its {len(is_usable)} conversations can be trained on "
                f"({read.left_out[0]}). Each needs a user's question and the assistant's answer."
            )
        blank = [name for name in columns[:2] if not any(text.strip() for text in values[name])]
        fault = f"column {blank[0]!r} is empty" if blank else "no row has both"
        raise DataError(
            f"{source}: none of its {len(is_usable)} rows has a question ({question!r}) and an "
            f"answer ({answer!r}): {fault}; the columns are: {', '.join(raw.available)}. Set "
            "data.question-column and data.answer-column to the columns that hold them."
        )
    labels = next((values[name] for name in columns[2:] if name != APART), [])
    found, gaps = _by_label(labels, is_usable)
    before = [b for usable, b in zip(is_usable, read.histories, strict=False) if usable and b]
    told = [turns for turns in before if turns != PLAIN_TEXT]
    return Survey(
        len(is_usable),
        sum(is_usable),
        found,
        gaps,
        form=read.form,
        conversations=len(told),
        left_out=read.left_out,
        unread=tuple(name for name in raw.available if name not in read.columns),
        has_instructions=INSTRUCTION in raw.available,
        texts=len(before) - len(told),
        with_system_only=sum(len(b) == 1 and b[0][0] == "system" for b in told),
    )
