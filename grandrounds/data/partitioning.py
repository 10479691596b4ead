"""Divides rows among sites, by `flwr-datasets`."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grandrounds.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

PARTITIONERS = ("iid", "dirichlet", "size-skewed", "natural")
"""How rows are divided among sites.

`iid`: sites of equal size, drawn at random. `dirichlet`: the rows of each label are divided by
shares drawn from a Dirichlet distribution, so that small alphas give sites with few labels
(Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022). `size-skewed`: site i holds a share
proportional to i + 1, drawn at random. `natural`: one site per value of a column.
"""

_DIRICHLET_MIN_ROWS = 10  # the default of flwr-datasets, where the data allow it
_CACHED_PARTITIONINGS = 4


def partition_rows(
    rows: Dataset,
    *,
    partitioner: str,
    num_partitions: int,
    partition_id: int,
    seed: int,
    partition_by: str = "",
    dirichlet_alpha: float = 0.5,
) -> Dataset:
    """Return the rows of one site.

    Every row belongs to exactly one site, and the same arguments always give the same rows. Rows
    are first shuffled by `seed`, then handed to a partitioner of flwr-datasets. The shuffle is
    what makes `iid` what it says: `IidPartitioner.load_partition` returns contiguous shards
    (`shard(contiguous=True)`), and the randomness comes from `FederatedDataset`, which shuffles
    first (`shuffle=True, seed=42`). So with `seed=42` a site holds the very rows that FlowerTune
    gives it. Read and tested with flwr-datasets 0.6.1.

    All partitions are worked out on the first call and remembered for the same `rows` object.

    Parameters
    ----------
    rows : datasets.Dataset
        All rows, as from `grandrounds.data.sources.load_rows`.
    partitioner : str
        One of `PARTITIONERS`.
    num_partitions : int
        Number of sites, at least 1.
    partition_id : int
        The site, from 0 to `num_partitions` - 1. With `natural`, sites are numbered in sorted
        order of their values.
    seed : int
        Seed of shuffle and division, at least 0.
    partition_by : str
        Column with the labels of `dirichlet` or the sites of `natural`.
    dirichlet_alpha : float
        Concentration of `dirichlet`, above 0. Draws are repeated (at most 11) until every site has
        at least a tenth of the average number of rows, or 10 rows if that is less.

    Raises
    ------
    DataError
        If an argument is out of its range, the column is missing, unnamed or has gaps, or a site
        would get no row.
    """
    _check_arguments(partitioner, num_partitions, partition_id, seed, dirichlet_alpha)
    partitions = _partitions(
        rows, partitioner, num_partitions, seed, partition_by, float(dirichlet_alpha)
    )
    return partitions[partition_id]


def _check_arguments(
    partitioner: str, num_partitions: int, partition_id: int, seed: int, alpha: float
) -> None:
    if partitioner not in PARTITIONERS:
        raise DataError(
            f"data.partitioner = {partitioner!r} is unknown; allowed: {', '.join(PARTITIONERS)}."
            f"{nearest(partitioner, PARTITIONERS)}"
        )
    if num_partitions < 1:
        raise DataError(f"data.num-partitions = {num_partitions}: at least 1 site is needed.")
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"there is no site {partition_id}: data.num-partitions = {num_partitions} numbers them "
            f"from 0 to {num_partitions - 1}. Raise it, or give this node another partition-id."
        )
    if seed < 0:
        raise DataError(f"the seed is {seed}, and must be 0 or more.")
    if not 0 < alpha < math.inf:
        raise DataError(f"data.dirichlet-alpha = {alpha:g}: a finite number above 0 is needed.")


@lru_cache(maxsize=_CACHED_PARTITIONINGS)
def _partitions(
    rows: Dataset,  # hashed by identity; load_rows gives the same object for the same source
    partitioner: str,
    num_partitions: int,
    seed: int,
    partition_by: str,
    alpha: float,
) -> tuple[Dataset, ...]:
    """Divide the rows among all sites."""
    if partitioner in ("dirichlet", "natural"):
        _check_partition_column(rows, partitioner, partition_by)
    if partitioner == "natural":
        _check_natural_sites(len(rows.unique(partition_by)), num_partitions, partition_by)
    elif len(rows) < num_partitions:
        raise DataError(
            f"{len(rows)} rows cannot fill {num_partitions} sites. "
            f"Set data.num-partitions to at most {len(rows)}, or give more data."
        )
    divider = _divider(partitioner, len(rows), num_partitions, seed, partition_by, alpha)
    # The natural partitioner always draws a progress bar, the Dirichlet one warns at every retry.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        divider.dataset = rows.shuffle(seed=seed, keep_in_memory=True)
        try:
            return tuple(divider.load_partition(index) for index in range(num_partitions))
        except ValueError as error:
            raise _unfilled(partitioner, len(rows), num_partitions, alpha) from error


def _divider(
    partitioner: str, num_rows: int, num_partitions: int, seed: int, partition_by: str, alpha: float
) -> Any:
    """Return the partitioner of flwr-datasets that a name of ours stands for."""
    from flwr_datasets import partitioner as flower

    if partitioner == "iid":
        return flower.IidPartitioner(num_partitions)
    if partitioner == "size-skewed":
        return flower.LinearPartitioner(num_partitions)
    if partitioner == "natural":
        return flower.NaturalIdPartitioner(partition_by)
    least_rows = max(1, min(_DIRICHLET_MIN_ROWS, num_rows // (10 * num_partitions)))
    return flower.DirichletPartitioner(
        num_partitions=num_partitions,
        partition_by=partition_by,
        alpha=alpha,
        min_partition_size=least_rows,
        self_balancing=False,
        seed=seed,
    )


def _check_partition_column(rows: Dataset, partitioner: str, partition_by: str) -> None:
    """Refuse a column that is not named, not there, or not filled."""
    there = ", ".join(rows.column_names)
    if not partition_by:
        raise DataError(
            f'data.partitioner = "{partitioner}" needs data.partition-by, the name of the column '
            f"with its {'sites' if partitioner == 'natural' else 'labels'}; there are: {there}."
        )
    if partition_by not in rows.column_names:
        raise DataError(
            f"data.partition-by = {partition_by!r}: there is no such column, only: {there}."
            f"{nearest(partition_by, rows.column_names)}"
        )
    gaps = sum(label is None or str(label).strip() == "" for label in rows[partition_by][:])
    if gaps:
        raise DataError(
            f"data.partition-by = {partition_by!r}: {gaps} of {len(rows)} rows have no value in "
            "this column. Fill it, remove these rows, or choose another column."
        )


def _check_natural_sites(sites: int, num_partitions: int, partition_by: str) -> None:
    if sites != num_partitions:
        raise DataError(
            f"data.partition-by = {partition_by!r} has {sites} different values, one per site, but "
            f"data.num-partitions = {num_partitions}. Set data.num-partitions = {sites}."
        )


def _unfilled(partitioner: str, num_rows: int, num_partitions: int, alpha: float) -> DataError:
    """Return the error for a division that leaves a site without rows."""
    if partitioner == "size-skewed":
        units = num_partitions * (num_partitions + 1) // 2
        return DataError(
            f"data.partitioner = 'size-skewed' leaves site 0 of {num_partitions} empty: its share "
            f"is 1/{units}, and there are only {num_rows} rows. Lower data.num-partitions, or give "
            "more data."
        )
    return DataError(
        f"data.partitioner = {partitioner!r} with data.dirichlet-alpha = {alpha:g} could not fill "
        f"{num_partitions} sites with {num_rows} rows. Raise data.dirichlet-alpha, lower "
        "data.num-partitions, or choose a data.partition-by with more labels."
    )
