"""Counts what a local file holds, in a second: no `datasets`, no torch.

Its rows are read and checked exactly as a run reads them, so that a wrong column is told at once.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.files import RawRows, from_records, read_file
from grandrounds.data.sources import (
    FILE_ENDINGS,
    checked_values,
    columns_read,
    existing_file,
    looks_like_path,
)
from grandrounds.data.sources import unreadable as damaged
from grandrounds.errors import DataError

SURVEYED_BYTES = 64 * 2**20
"""Largest file that is surveyed; a larger one is only looked up."""


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


def survey(source: str, question: str, answer: str, partition_by: str = "") -> Survey | None:
    """Return what a data source holds; None for a hub data set and a file that is too large.

    Parameters
    ----------
    question, answer, partition_by : str
        Columns; `partition_by` is empty if there is none.

    Raises
    ------
    DataError
        If a local file does not exist or cannot be read, lacks a column or has no row with a
        question and an answer.
    """
    columns = (question, answer, *((partition_by,) if partition_by else ()))
    if source in EMBEDDED:
        return _survey_embedded(source, columns)
    if not looks_like_path(source):
        for ending in FILE_ENDINGS:
            if Path(source + ending).is_file():
                raise DataError(
                    f"{source}: no such file. Did you mean '{source}{ending}'? A name without an "
                    "ending is a data set on the Hugging Face hub."
                )
        return None
    path, version = existing_file(source)
    return _survey_file(source, path, version, columns) if version[1] <= SURVEYED_BYTES else None


@lru_cache(maxsize=4)
def _survey_embedded(source: str, columns: tuple[str, ...]) -> Survey:
    raw = from_records(enumerate(embedded_rows(source), 1), columns, "row")
    return _counted(raw, source, columns)


@lru_cache(maxsize=4)
def _survey_file(
    source: str, path: Path, version: tuple[int, int], columns: tuple[str, ...]
) -> Survey:
    """Survey one file; `version` is part of the cache key, so that a changed file is read again."""
    del version
    try:
        raw = read_file(path, source, *columns_read(columns))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise damaged(source, error) from error
    return _counted(raw, source, columns)


def _counted(raw: RawRows, source: str, columns: tuple[str, ...]) -> Survey:
    values = checked_values(raw, source, columns)
    question, answer = columns[:2]
    is_usable = [
        bool(asked.strip() and answered.strip())
        for asked, answered in zip(values[question], values[answer], strict=True)
    ]
    if not any(is_usable):
        blank = [name for name in columns[:2] if not any(text.strip() for text in values[name])]
        fault = f"column {blank[0]!r} is empty" if blank else "no row has both"
        raise DataError(
            f"{source}: none of its {len(is_usable)} rows has a question ({question!r}) and an "
            f"answer ({answer!r}): {fault}; the columns are: {', '.join(raw.available)}. Set "
            "data.question-column and data.answer-column to the columns that hold them."
        )
    labels = values[columns[2]] if len(columns) > 2 else []
    found: Counter[Any] = Counter()
    for label, usable in zip(labels, is_usable, strict=False):
        if label is not None and str(label).strip():
            found[label] += usable
    gaps = sum(label is None or not str(label).strip() for label in labels)
    return Survey(len(is_usable), sum(is_usable), dict(found), gaps)
