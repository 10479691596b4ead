"""Rows of preferences for `train.objective = "dpo"`: a question and two answers, one preferred.

They become `Rows` like those of other sources, with the rejected answers in the column
`forms.REJECTED`. A row without two different answers to one prompt has no question there, and is
counted as empty; the first such row and its reason are told.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.data.conversations import Turn
from grandrounds.data.files import Choice, RawRows
from grandrounds.data.forms import PREFERRED, PROMPT, REJECTED, USUAL
from grandrounds.data.preferences import Preference, each_preference
from grandrounds.data.read import labels_of
from grandrounds.data.rows import Rows
from grandrounds.errors import DataError, nearest

_NONE = Preference((), "", "", "")

_KEYS = ("data.question-column", "data.answer-column", "data.rejected-column")


@dataclass(frozen=True)
class Pairs:
    """What the rows of a source prefer, in their order."""

    preferences: tuple[Preference, ...]
    """Of a row that holds none, all texts are empty."""
    left_out: tuple[str, ...]
    """Rows that hold none, each with its place and the reason."""
    labels: dict[str, list[Any]]
    """Further columns, as `read.labels_of` has them."""
    columns: frozenset[str]
    """The columns of the source that they come from."""

    @property
    def histories(self) -> list[tuple[Turn, ...]]:
        """What was said before each question."""
        return [pair.before for pair in self.preferences]


def names_of(available: Sequence[str], columns: Sequence[str]) -> tuple[str, str, str]:
    """Return the columns of prompts, chosen and rejected answers.

    Parameters
    ----------
    columns
        Those of question, answer and rejected answer, as configured. If the first two are the usual
        ones and not there, they are `prompt` and `chosen`.
    """
    question, answer, rejected = columns[:3]
    if (question, answer) == USUAL and not set(USUAL) <= set(available):
        return PROMPT, PREFERRED[0], rejected
    return question, answer, rejected


def columns_of_pairs(columns: tuple[str, ...]) -> Choice:
    """Return which columns to read, for those of question, both answers, and labels."""

    def choose(available: Sequence[str]) -> tuple[str, ...]:
        wanted = dict.fromkeys((*names_of(available, columns), *columns[3:]))
        return tuple(name for name in wanted if name in available)

    return choose


def pairs_of(raw: RawRows, source: str, columns: tuple[str, ...]) -> Pairs:
    """Return the preferences of a source.

    Parameters
    ----------
    columns
        Those of question, answer and rejected answer, as configured, then labels.

    Raises
    ------
    DataError
        If a column is missing, or no row holds two different answers to one prompt.
    """
    names, labels = names_of(raw.available, columns), columns[3:]
    _check_columns(raw.available, source, names, columns)
    for name in labels:
        if name not in raw.values:
            raise DataError(
                f"{source}: there is no column {name!r}; the columns are: "
                f"{', '.join(raw.available)}.{nearest(name, raw.available)} Correct "
                "data.partition-by."
            )
    each = list(each_preference(raw, names))
    left_out = tuple(why for why in each if isinstance(why, str))
    if len(left_out) == len(each):
        why = f" ({left_out[0]})" if left_out else ""
        raise DataError(
            f"{source}: none of its {len(each)} rows is a preference{why}. Each needs a prompt, a "
            "chosen answer and another one that is rejected."
        )
    pairs = tuple(_NONE if isinstance(found, str) else found for found in each)
    values = {name: labels_of(raw.values[name], f"{source}, column {name!r}") for name in labels}
    return Pairs(pairs, left_out, values, frozenset((*names, *labels)))


def _check_columns(
    available: Sequence[str], source: str, names: tuple[str, str, str], columns: Sequence[str]
) -> None:
    """Raise `DataError` if a column is missing; turns may begin with the prompt."""
    is_named = columns[0] != USUAL[0]
    for key, name in zip(_KEYS, names, strict=True):
        if name in available or (key == _KEYS[0] and not is_named):
            continue
        raise DataError(
            f'{source}: there is no column {name!r}, and train.objective = "dpo" trains on '
            f"preferences: a prompt, a chosen and a rejected answer. The columns are: "
            f"{', '.join(available)}.{nearest(name, available)} Name it in {key}, or set "
            'train.objective = "sft".'
        )


def rows_of_pairs(raw: RawRows, source: str, columns: tuple[str, ...], commit: str = "") -> Rows:
    """Return a source of preferences as rows; tell what is left out. Errors as of `pairs_of`."""
    found = pairs_of(raw, source, columns)
    if found.left_out:
        print(
            f"grandrounds: {source}: {len(found.left_out):,} of {len(found.preferences):,} "
            f"preferences are not trained on; the first: {found.left_out[0]}",
            file=sys.stderr,
        )
    pairs = found.preferences
    texts = {
        columns[0]: [pair.question for pair in pairs],
        columns[1]: [pair.chosen for pair in pairs],
        REJECTED: [pair.rejected for pair in pairs],
    }
    return Rows(texts | found.labels, commit, found.histories)
