"""A site's own questions and answers, from a file or a database query."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from grandrounds.config.keys import DataConfig
from grandrounds.config.values import words_of
from grandrounds.data.alone import columns_read_alone
from grandrounds.data.embedded import EMBEDDED
from grandrounds.data.examples import SiteData, split_rows
from grandrounds.data.files import RawRows
from grandrounds.data.forms import APART, INSTRUCTION
from grandrounds.data.own_prompt import columns_apart
from grandrounds.data.partitioning import Partition
from grandrounds.data.read import columns_read
from grandrounds.data.rows import Rows
from grandrounds.data.sources import load_rows, rows_of
from grandrounds.errors import DataError, first_line
from grandrounds.site.custody import order
from grandrounds.site.custody.identifiers import CERTAIN, count_identifiers, fingerprint
from grandrounds.site.custody.site_file import Node, OwnData, SiteFile
from grandrounds.site.local_data import Site, tokenized_site, with_subgroups
from grandrounds.site.private.units import UnitRule, alike, split_by_unit, unit_name
from grandrounds.wire.subgroups import LEAST


def own_site(
    site: SiteFile, model_name: str, prompt: DataConfig, seq_length: int, run: str
) -> Site:
    """Return the site's examples, ready for the model.

    Held-out examples are drawn with the site's own seed, so they are the same in every run. With
    units (`units_of_site`), each is held out or not by itself.

    Parameters
    ----------
    prompt : DataConfig
        Of the run: only the prompt and the columns of subgroups are read.
    run : str
        The run's key; see `database_rows`.

    Raises
    ------
    DataError
        If the source cannot be used, or has no training example.
    """
    how, template = _split_of(site, private=False), prompt.prompt_template
    rows = _rows(site, run, template=template)
    found = _tokenized(rows, how, model_name, prompt, seq_length)
    allowed = words_of(site.tell.subgroup_columns)
    columns = [name for name in words_of(prompt.subgroup_columns) if name in allowed]
    return with_subgroups(found, rows, columns, max(LEAST, site.tell.min_held_out_examples))


def private_site(
    site: SiteFile, model_name: str, prompt: DataConfig, seq_length: int, run: str
) -> Site:
    """Return the site's examples with their units; parameters and errors as for `own_site`.

    Whether a unit is held out, and which of its records train, depends on that unit and a secret of
    the site alone.
    """
    rows = _rows(site, run, private=True, template=prompt.prompt_template)
    how = private_split_of(site)
    return _tokenized(rows, how, model_name, prompt, seq_length)


def private_split_of(site: SiteFile) -> OwnSplit:
    """Return how a site's rows are divided where its visits are private."""
    privacy = site.privacy
    secret = hmac.digest(order.secret_of(site.place(site.agent.state)), b"units", "sha256")
    units = UnitRule(secret, privacy.unit_column, privacy.max_records_of_unit)
    return OwnSplit(site.data, site.node, privacy.unit_column, units)


def own_split(
    site: SiteFile, run: str = "", *, private: bool = False, template: str = ""
) -> SiteData:
    """Return the site's examples as text, with counts of its rows.

    Parameters
    ----------
    private : bool
        Whether they are divided by unit, as for private visits.
    template : str
        `data.prompt-template` of a run, which may show instructions apart from questions.
    """
    rows = _rows(site, run, private=private, template=template)
    return _split_of(site, private=private).of(rows)


def _split_of(site: SiteFile, *, private: bool) -> OwnSplit:
    if private:
        return private_split_of(site)
    return OwnSplit(site.data, site.node, site.privacy.unit_column)


def units_alike(site: SiteFile) -> list[tuple[str, str]]:
    """Return pairs of a site's unit names that may mean one unit (`units.alike`)."""
    column = site.privacy.unit_column
    return alike(map(unit_name, _rows(site, "", private=True)[column])) if column else []


@dataclass(frozen=True)
class OwnSplit:
    """How a site's rows are divided into training and held-out examples."""

    data: OwnData
    node: Node
    unit_column: str
    units: UnitRule | None = None
    """None: visits are not private."""

    def of(self, rows: Rows) -> SiteData:
        """Return the examples in the site's rows."""
        data, node = self.data, self.node
        if self.units:
            return split_by_unit(
                rows,
                self.units,
                question_column=data.question_column,
                answer_column=data.answer_column,
                fraction=data.held_out_fraction,
            )
        return split_rows(
            rows,
            Partition(data.held_out_seed, node.partition_id, node.num_partitions),
            question_column=data.question_column,
            answer_column=data.answer_column,
            held_out_fraction=data.held_out_fraction,
        )


@dataclass(frozen=True)
class Searched:
    """What a search for identifiers found in a site's examples."""

    version: str
    """SHA-256 of the examples."""
    examples: int
    """Number of examples, held-out ones included."""
    counts: Mapping[str, int]
    """Kind of identifier → number of examples in which it seems to occur."""

    @property
    def certain(self) -> dict[str, int]:
        """The counts of kinds on which a site may refuse to train."""
        return {kind: count for kind, count in self.counts.items() if kind in CERTAIN}


def own_identifiers(
    site: SiteFile, run: str = "", *, private: bool = False, template: str = ""
) -> Searched:
    """Return what looks like identifiers of persons in a site's examples.

    A process searches the same examples once; nothing is counted with `data.identifiers = "off"`.

    Parameters
    ----------
    private : bool
        Whether they are read as for private visits.
    template : str
        As for `own_split`.
    """
    rows = _rows(site, run, private=private, template=template)
    return _searched(rows, _split_of(site, private=private))


@lru_cache(maxsize=4)
def _searched(rows: Rows, how: OwnSplit) -> Searched:
    split, data = how.of(rows), how.data
    number = len(split.train) + len(split.held_out)
    counts = {} if data.identifiers == "off" else count_identifiers(_all_said(split))
    return Searched(fingerprint(_all_said(split)), number, counts)


def _all_said(split: SiteData) -> Iterator[str]:
    """Yield all that each example says, one after the other: they may not fit in memory."""
    for example in chain(split.train, split.held_out):
        yield "\n".join([*(said for _, said in example.before), example.question, example.answer])


def _rows(site: SiteFile, run: str, *, private: bool = False, template: str = "") -> Rows:
    data, unit = site.data, site.privacy.unit_column
    subgroups = () if private else words_of(site.tell.subgroup_columns)
    kept = tuple(dict.fromkeys((*([unit] if unit else []), *subgroups, *columns_apart(template))))
    columns = (data.question_column, data.answer_column, *kept)
    if data.database:
        return database_rows(Query(data.database, data.query, columns, alone=private), run)
    source = data.source if data.source in EMBEDDED else str(site.place(data.source))
    return load_rows(
        source,
        question_column=data.question_column,
        answer_column=data.answer_column,
        keep_columns=columns[2:],
        alone=private,
    )


@lru_cache(maxsize=4)
def _tokenized(
    rows: Rows,  # by identity: an unchanged source returns the same object
    how: OwnSplit,
    model_name: str,
    prompt: DataConfig,
    seq_length: int,
) -> Site:
    number, is_private = how.node.partition_id, how.units is not None
    return tokenized_site(how.of(rows), number, model_name, prompt, seq_length, alone=is_private)


@dataclass
class _Read:
    """What the last query gave."""

    outcome: Rows | str
    """The rows, or why there are none."""
    at: float
    """`time.monotonic()`."""
    run: str
    """The run that was given it last."""


@dataclass(frozen=True)
class Query:
    """What is asked of a database."""

    url: str
    """SQLAlchemy's URL."""
    query: str
    """One statement that returns rows."""
    columns: tuple[str, ...]
    """Question, answer, and the columns of units and instructions where they are read."""
    alone: bool = False
    """Whether no row may decide how another one is read."""


_databases: dict[Query, _Read] = {}

FRESH_SECONDS = 24 * 3600.0
"""Age at which rows are read again, by the first message of another run."""

RETRY_SECONDS = 60.0
"""Age at which a query that failed is tried again."""


def database_rows(query: Query, run: str = "") -> Rows:
    """Return the rows of a database, queried at most once a day by a process.

    A run keeps the rows that it began with. Nothing is written to disk: they stay in this process's
    memory.

    Parameters
    ----------
    run : str
        The run's key.

    Raises
    ------
    DataError
        As `queried`; the same error for a minute, without another query.
    """
    known, now = _databases.get(query), time.monotonic()
    if known is not None:
        failed, age = isinstance(known.outcome, str), now - known.at
        if age >= RETRY_SECONDS if failed else age >= FRESH_SECONDS and run != known.run:
            known = None
    if known is None:
        _databases.clear()  # of an earlier site.toml
        try:
            known = _Read(queried(query), now, run)
        except DataError as error:
            known = _Read(str(error), now, run)
        _databases[query] = known
    if isinstance(known.outcome, str):
        raise DataError(known.outcome)
    known.run = run
    return known.outcome


def queried(asked: Query) -> Rows:
    """Return the rows of a database query, sorted so that the database's order does not matter.

    The database is accessed through SQLAlchemy; the site installs its drivers.

    Raises
    ------
    DataError
        If the driver is missing, the database cannot be reached, the query fails, or a column is
        missing. The message never contains a password.
    """
    url, columns, question_column = asked.url, asked.columns, asked.columns[0]
    names, rows = _asked(url, asked.query)
    choose = columns_read_alone(columns) if asked.alone else columns_read(columns)
    read = choose(names)
    own = columns if question_column in names else read
    order = (*own, INSTRUCTION) if APART in columns else own
    by = [names.index(name) for name in order if name in names]
    rows.sort(key=lambda row: [str(row[i]) for i in by])
    values = {name: [row[names.index(name)] for row in rows] for name in read if name in names}
    raw = RawRows(values, tuple(names), range(1, len(rows) + 1), "row")
    return rows_of(raw, f"data.database = {_without_password(url)!r}", columns, asked.alone)


def _asked(url: str, query: str) -> tuple[list[str], list[Any]]:
    """Return the column names and the rows of a query."""
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
            f"{where} is not an SQLAlchemy URL ({first_line(error)}): dialect+driver://user@host/name."
        ) from error
    except ModuleNotFoundError as error:
        raise DataError(f"{where} requires a driver: pip install {error.name}.") from error
    try:
        with engine.connect() as connection:
            result = connection.execute(sqlalchemy.text(query))
            if not result.returns_rows:
                raise DataError(f"data.query = {query!r} returns no rows: it must be a SELECT.")
            names = list(result.keys())
            rows = list(result.fetchall())
    except sqlalchemy.exc.SQLAlchemyError as error:
        fault = first_line(getattr(error, "orig", None) or error)
        raise DataError(
            f"{where}: the query failed ({fault}). Check the address, the user's privileges, and "
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
