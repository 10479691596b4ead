"""A site's own questions and answers: a file, or a query over a database of the site."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grandrounds.data.examples import SiteData, split_rows
from grandrounds.data.files import RawRows
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.partitioning import Partition
from grandrounds.data.sources import load_rows, rows_of
from grandrounds.errors import DataError, first_line
from grandrounds.site.custody.site_file import Node, OwnData, SiteFile
from grandrounds.site.local_data import Site, tokenized_site

if TYPE_CHECKING:
    from datasets import Dataset


def own_site(site: SiteFile, model_name: str, template: str, seq_length: int, run: str) -> Site:
    """Return the site's examples, ready for the model.

    Held-out examples are drawn by the site's own seed, so that they are the same in every run.

    Parameters
    ----------
    run : str
        The run's key: a process asks a database once for a run, so that its examples stay the same.

    Raises
    ------
    DataError
        If the source cannot be used, or has no example to learn.
    """
    return _tokenized(_rows(site, run), site.data, site.node, model_name, template, seq_length)


def own_split(site: SiteFile, run: str = "") -> SiteData:
    """Return the site's examples as text, and what became of its rows."""
    return _split(_rows(site, run), site.data, site.node)


def _rows(site: SiteFile, run: str) -> Dataset:
    data = site.data
    if data.database:
        return database_rows(
            data.database, data.query, data.question_column, data.answer_column, run
        )
    source = data.source if data.source == FORMULARY else str(site.place(data.source))
    return load_rows(source, question_column=data.question_column, answer_column=data.answer_column)


def _split(rows: Dataset, data: OwnData, node: Node) -> SiteData:
    return split_rows(
        rows,
        Partition(data.held_out_seed, node.partition_id, node.num_partitions),
        question_column=data.question_column,
        answer_column=data.answer_column,
        held_out_fraction=data.held_out_fraction,
    )


@lru_cache(maxsize=8)
def _tokenized(
    rows: Dataset,  # by identity: a source gives the same object until it changes
    data: OwnData,
    node: Node,
    model_name: str,
    template: str,
    seq_length: int,
) -> Site:
    split = _split(rows, data, node)
    return tokenized_site(split, node.partition_id, model_name, template, seq_length)


@lru_cache(maxsize=4)
def database_rows(
    url: str, query: str, question_column: str, answer_column: str, run: str = ""
) -> Dataset:
    """Return what a query over a database finds, sorted, so that its own order plays no part.

    Nothing is written anywhere: the rows are in this process's memory alone. SQLAlchemy speaks to
    the database; its drivers are the site's to install.

    Parameters
    ----------
    url : str
        SQLAlchemy's URL.
    query : str
        One statement that gives rows.

    Raises
    ------
    DataError
        If the driver is missing, the database cannot be reached, the query fails, or a column is
        not there. A password never stands in the message.
    """
    del run  # a key of the cache
    columns = (question_column, answer_column)
    names, rows = _asked(url, query)
    wanted = [names.index(name) for name in columns if name in names]
    rows.sort(key=lambda row: [str(row[i]) for i in wanted])
    values = {names[i]: [row[i] for row in rows] for i in wanted}
    raw = RawRows(values, tuple(names), range(1, len(rows) + 1), "row")
    return rows_of(raw, f"data.database = {_without_password(url)!r}", columns)


def _asked(url: str, query: str) -> tuple[list[str], list[Any]]:
    """Return the names of a query's columns, and its rows."""
    try:
        import sqlalchemy
    except ModuleNotFoundError as error:
        raise DataError(
            'data.database needs SQLAlchemy: pip install "grandrounds[site]".'
        ) from error
    where = f"data.database = {_without_password(url)!r}"
    try:
        engine = sqlalchemy.create_engine(url)
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise DataError(
            f"{where} is no SQLAlchemy URL ({first_line(error)}): dialect+driver://user@host/name."
        ) from error
    except ModuleNotFoundError as error:
        raise DataError(f"{where} needs the driver {error.name}: pip install it.") from error
    try:
        with engine.connect() as connection:
            result = connection.execute(sqlalchemy.text(query))
            if not result.returns_rows:
                raise DataError(f"data.query = {query!r} gives no rows: it must be a SELECT.")
            names = list(result.keys())
            rows = list(result.fetchall())
    except sqlalchemy.exc.SQLAlchemyError as error:
        fault = first_line(getattr(error, "orig", None) or error)
        raise DataError(
            f"{where}: the query failed ({fault}). Check the address, the rights of the user, and "
            f"data.query = {query!r}."
        ) from error
    finally:
        engine.dispose()
    return names, rows


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "(not a URL)"
