"""Rows of a data source: columns of text and integers, and conversations' histories.

Here they are in memory; `stored_rows` has those of a source that is larger.

The few operations that a run needs are those of a `datasets.Dataset`, under its names and with its
results. Importing that library takes longer than reading the formulary or a file of 5,000 rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar, overload

from grandrounds.data.conversations import Turn
from grandrounds.data.forms import APART, REJECTED

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


class Rows:
    """An immutable table; two tables are equal only if they are the same object."""

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        commit: str = "",
        histories: Sequence[tuple[Turn, ...]] = (),
    ) -> None:
        self._columns = {name: list(values) for name, values in columns.items()}
        self._histories = list(histories)
        self.commit = commit
        """Commit of the hub's data set that they come from, where it is known."""

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, name: str) -> Sequence[Any]:
        """Return a column."""
        return self._columns[name]

    @property
    def is_stored(self) -> bool:
        """Whether the texts lie on the disk: reading them all into memory may fill it."""
        return False

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, in order."""
        return list(self._columns)

    @property
    def histories(self) -> Sequence[tuple[Turn, ...]]:
        """What was said before the question of each row."""
        return self._histories or [()] * len(self)

    def reader(self, names: tuple[str, str]) -> Callable[[int], tuple[Any, ...]]:
        """Return what reads a row: its question, its answer, what was said before, the
        instruction where it is apart, and the rejected answer of a preference.

        Parameters
        ----------
        names
            Columns of the question and of the answer.
        """
        has = self.column_names
        apart = [self[APART]] if APART in has else []
        if REJECTED in has:
            apart = [*(apart or [[""] * len(self)]), self[REJECTED]]
        columns = [self[names[0]], self[names[1]], self.histories, *apart]
        return lambda place: tuple(column[place] for column in columns)

    def unique(self, name: str) -> list[Any]:
        """Return the distinct values of a column, by first occurrence."""
        return list(dict.fromkeys(self[name]))

    def select(self, indices: Sequence[int]) -> Rows:
        """Return some of the rows."""
        columns = {name: [v[i] for i in indices] for name, v in self._columns.items()}
        return Rows(columns, histories=[self._histories[i] for i in indices if self._histories])

    def shuffle(self, seed: int) -> Rows:
        """Return the rows in the order that `Dataset.shuffle` gives them for this seed."""
        import numpy as np  # only here: a configuration is checked before NumPy is loaded

        order: list[int] = np.random.default_rng(seed).permutation(len(self)).tolist()
        return self.select(order)

    def shard(self, count: int, number: int) -> Rows:
        """Return a contiguous part; the first ones hold one row more where it does not divide."""
        size, rest = divmod(len(self), count)
        start = size * number + min(number, rest)
        return self.select(range(start, start + size + (number < rest)))

    def as_dataset(self) -> Dataset:
        """Return the same rows as a data set of Hugging Face."""
        from datasets import Dataset, Features, Value  # only here: 1 to 2 s

        types = {
            name: Value("int64" if any(isinstance(v, int) for v in values) else "string")
            for name, values in self._columns.items()
        }
        return Dataset.from_dict(self._columns, features=Features(types))


class Joined(Sequence[Item]):
    """Sequences that follow one another, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = bisect_right(self._ends, place)
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._parts[number][place - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self._parts)
