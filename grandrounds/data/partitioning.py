"""Divides rows among sites as `flwr-datasets` does."""

from __future__ import annotations

import math
import warnings
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grandrounds.data.rows import Rows
from grandrounds.errors import DataError, nearest

PARTITIONERS = ("iid", "dirichlet", "size-skewed", "natural")
"""How rows are divided among sites.

`iid`: sites of equal size, sampled at random. `dirichlet`: the rows of each label are divided in
proportions sampled from a Dirichlet distribution, so that a small alpha gives sites with few labels
(Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022). `size-skewed`: site i holds a share
proportional to i + 1, sampled at random. `natural`: one site per value of a column.
"""

_DIRICHLET_MIN_ROWS = 10  # the default of flwr-datasets, where the data allow it
_CACHED_DIVISIONS = 4


@dataclass(frozen=True)
class Partition:
    """One site's partition, and the seed of its random choices."""

    seed: int
    """At least 0."""
    number: int
    """The site, from 0 to `count` - 1."""
    count: int
    """Number of sites, at least 1."""


@dataclass(frozen=True)
class Division:
    """How rows are divided among sites."""

    partitioner: str
    """One of `PARTITIONERS`."""
    column: str
    """Column with the labels of `dirichlet` or the sites of `natural`."""
    alpha: float
    """Concentration of `dirichlet`, above 0."""


def partition_rows(rows: Rows, division: Division, partition: Partition) -> Rows:
    """Return the rows of one site.

    Every row belongs to exactly one site, and the same arguments always give the same rows. Rows
    are shuffled by the seed, then divided by a partitioner of flwr-datasets, or as `IidPartitioner`
    and `NaturalIdPartitioner` would, without loading that library. Without the shuffle
    `iid` would not be random: `IidPartitioner.load_partition` returns contiguous shards
    (`shard(contiguous=True)`), and the randomness comes from `FederatedDataset`, which shuffles
    first (`shuffle=True, seed=42`). So with seed 42 a site holds exactly the rows that FlowerTune
    gives it. Read and tested with flwr-datasets 0.6.1.

    The sites of `natural` are numbered in the sorted order of their values. `dirichlet` resamples
    (at most 11 times) until every site has at least a tenth of the average number of rows, or 10
    rows if that is less. The first call computes all partitions and caches them by the `rows`
    object.

    Parameters
    ----------
    rows : Rows
        All rows, as from `grandrounds.data.sources.load_rows`.

    Raises
    ------
    DataError
        If an argument is out of range, the column is missing, unnamed or has gaps, or a site would
        get no row.
    """
    name, number, count = division.partitioner, partition.number, partition.count
    if name not in PARTITIONERS:
        raise DataError(
            f"data.partitioner = {name!r} is unknown; allowed: {', '.join(PARTITIONERS)}."
            f"{nearest(name, PARTITIONERS)}"
        )
    if count < 1:
        raise DataError(f"data.num-partitions = {count}: at least 1 site is needed.")
    if not 0 <= number < count:
        raise DataError(
            f"site {number} does not exist: data.num-partitions = {count} numbers the sites from 0 "
            f"to {count - 1}. Raise it, or give this node another partition-id."
        )
    if partition.seed < 0:
        raise DataError(f"the seed is {partition.seed}, but must be at least 0.")
    if not 0 < division.alpha < math.inf:
        raise DataError(
            f"data.dirichlet-alpha = {division.alpha:g}: a finite number above 0 is needed."
        )
    return _partitions(rows, division, partition.seed, count)[number]


@lru_cache(maxsize=_CACHED_DIVISIONS)
def _partitions(
    rows: Rows,  # hashed by identity; load_rows returns the same object for the same source
    division: Division,
    seed: int,
    count: int,
) -> tuple[Rows, ...]:
    """Divide the rows among all sites."""
    name, column = division.partitioner, division.column
    labels = 0
    if name in ("dirichlet", "natural"):
        _check_partition_column(rows, name, column)
        labels = len(rows.unique(column)) if name == "natural" else 0
    check_counts(division, count, len(rows), labels)
    shuffled = rows.shuffle(seed)
    if name == "iid":
        return tuple(shuffled.shard(count, number) for number in range(count))
    if name == "natural":
        found: dict[Any, array[int]] = {v: array("q") for v in sorted(rows.unique(column))}
        for index, value in enumerate(shuffled[column]):
            found[value].append(index)
        return tuple(shuffled.select(indices) for indices in found.values())
    partitioner = _partitioner(division, seed, count, len(rows))
    with warnings.catch_warnings():  # the Dirichlet partitioner warns at every retry
        warnings.simplefilter("ignore")
        of_rows = {column: shuffled[column]} if name == "dirichlet" else {}
        number = f"number of {column}"
        partitioner.dataset = Rows({**of_rows, number: range(len(rows))}).as_dataset()
        try:
            parts = [partitioner.load_partition(n)[number][:] for n in range(count)]
            return tuple(shuffled.select(part) for part in parts)
        except ValueError as error:
            raise _unfilled(division, count, len(rows)) from error


def _partitioner(division: Division, seed: int, count: int, num_rows: int) -> Any:
    """Return the partitioner of flwr-datasets for a division at random."""
    from flwr_datasets import partitioner as flower  # only here: it loads plotting libraries

    if division.partitioner == "size-skewed":
        return flower.LinearPartitioner(count)
    return flower.DirichletPartitioner(
        num_partitions=count,
        partition_by=division.column,
        alpha=float(division.alpha),
        min_partition_size=max(1, min(_DIRICHLET_MIN_ROWS, num_rows // (10 * count))),
        self_balancing=False,
        seed=seed,
    )


def check_column(rows: Rows, key: str, column: str) -> None:
    """Raise `DataError` if the column that a key names does not exist."""
    if column not in rows.column_names:
        raise DataError(
            f"{key} = {column!r}: there is no such column; the columns are: "
            f"{', '.join(rows.column_names)}.{nearest(column, rows.column_names)}"
        )


def _check_partition_column(rows: Rows, partitioner: str, column: str) -> None:
    """Raise `DataError` for a column that is not named, does not exist or has gaps."""
    if not column:
        raise DataError(
            f'data.partitioner = "{partitioner}" needs data.partition-by, the column with its '
            f"{'sites' if partitioner == 'natural' else 'labels'}; the columns are: "
            f"{', '.join(rows.column_names)}."
        )
    check_column(rows, "data.partition-by", column)
    gaps = sum(label is None or str(label).strip() == "" for label in rows[column])
    check_gaps(column, gaps, len(rows))


def check_gaps(column: str, gaps: int, num_rows: int) -> None:
    """Raise `DataError` if rows have no value in the partition column."""
    if gaps:
        raise DataError(
            f"data.partition-by = {column!r}: {gaps} of {num_rows} rows have no value in this "
            "column. Fill it, remove these rows, or choose another column."
        )


def check_counts(division: Division, count: int, num_rows: int, labels: int) -> None:
    """Raise `DataError` if rows cannot be divided among `count` sites.

    Parameters
    ----------
    labels : int
        Distinct values of the column of `natural`.
    """
    if division.partitioner == "natural":
        if labels != count:
            raise DataError(
                f"data.partition-by = {division.column!r} has {labels} distinct values, one per "
                f"site, but data.num-partitions = {count}. Set data.num-partitions = {labels}, or "
                "leave it out."
            )
    elif num_rows < count:
        raise DataError(
            f"{num_rows} rows cannot fill {count} sites. "
            f"Set data.num-partitions to at most {num_rows} (--sites {num_rows}), or provide more "
            "data."
        )


def _unfilled(division: Division, count: int, num_rows: int) -> DataError:
    """Return the error for a division that leaves a site without rows."""
    if division.partitioner == "size-skewed":
        units = count * (count + 1) // 2
        return DataError(
            f"data.partitioner = 'size-skewed' leaves site 0 of {count} empty: its share is "
            f"1/{units}, and there are only {num_rows} rows. Lower data.num-partitions, or provide "
            "more data."
        )
    return DataError(
        f"data.partitioner = {division.partitioner!r} with data.dirichlet-alpha = "
        f"{division.alpha:g} could not fill {count} sites with {num_rows} rows. Raise "
        "data.dirichlet-alpha, lower data.num-partitions, or choose a data.partition-by with more "
        "labels."
    )
