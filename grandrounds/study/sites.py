"""The number of sites, and of those that train in a round, where the data or an option say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from grandrounds.config import recipes
from grandrounds.config.automatic import EMBEDDED_DATA
from grandrounds.config.keys import Config
from grandrounds.config.prompt import KEY
from grandrounds.config.recipes import Layer
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, DataError
from grandrounds.wire.names import NAME, SiteNames, names_of

_COUNT, _FRACTION = "data.num-partitions", "strategy.fraction-train"


def with_sites(
    layers: Sequence[Layer], sites_per_round: int | None = None, *, may_load: bool = False
) -> list[Layer]:
    """Return the layers of a configuration, completed by what the data say.

    Plain text has no prompt; one that is set is an error then. `natural` partitions without a
    number of sites have one for each value of the column.

    Parameters
    ----------
    sites_per_round : int, optional
        Sites that train in a round; becomes `strategy.fraction-train`.
    may_load : bool
        Whether data that cannot be surveyed in a second are loaded, as a run will do anyway.

    Raises
    ------
    ConfigError
        If there are fewer sites than are to train in a round, or the number cannot be known.
    """
    layers = [*layers, *_without_prompt(layers)]
    values = recipes.complete(recipes.merged(layers))
    if values["data.partitioner"] == "natural" and not any(_COUNT in made for _, made in layers):
        named = (values[key] for key in _COLUMNS)
        source, question, answer, column = (str(name) for name in named)
        columns = question, answer, column
        against = _rejected_column(values)
        count = number_of_sites(source, columns, may_load, against) if column else None
        if count:
            layers.append((f"the values of column {column!r}", {_COUNT: count}))
            values[_COUNT] = count
    if sites_per_round is None:
        return layers
    sites = values[_COUNT]
    if not isinstance(sites, int) or isinstance(sites, bool) or sites < 1:
        return layers  # refused with all other problems
    if not 1 <= sites_per_round <= sites:
        raise ConfigError(
            f"--sites-per-round {sites_per_round} is not allowed: there are {sites} sites "
            f"({_COUNT}), so use 1 to {sites}, or raise --sites."
        )
    fraction: dict[str, Scalar] = {_FRACTION: sites_per_round / sites, "strategy.fraction-fit": ""}
    return [*layers, ("--sites-per-round", fraction)]


def _without_prompt(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yield a layer that leaves prompts out, if the data are plain text and no prompt is set."""
    if any(KEY in made for _, made in layers):
        return
    from grandrounds.data.survey import survey

    values = recipes.complete(recipes.merged(layers))
    source, question, answer = (str(values[key]) for key in _COLUMNS[:3])
    if _rejected_column(values):  # preferences have prompts
        return
    try:
        found = survey(source, question, answer) if source not in EMBEDDED_DATA else None
    except DataError:
        return  # told with its reason when the data are checked
    if found and found.texts:
        yield "the data", {KEY: "text"}


def names_of_sites(config: Config) -> SiteNames:
    """Return the sites' names where the data have them and can be surveyed in a second."""
    from grandrounds.data.survey import survey
    from grandrounds.site.local_data import natural_name

    data = config.data
    if data.partitioner != "natural":
        return SiteNames()
    try:
        found = survey(
            config.static.name,
            *(data.question_column, data.answer_column, data.partition_by),
            rejected=data.rejected_column if config.is_on_pairs else "",
        )
    except DataError:
        return SiteNames()  # told with its reason when the data are checked
    return names_of(
        {"partition-id": number, NAME: natural_name(data.partition_by, value)}
        for number, value in enumerate(sorted(found.usable_by_label if found else ()))
    )


_COLUMNS = (
    "static.dataset.name",
    "data.question-column",
    "data.answer-column",
    "data.partition-by",
)


def _rejected_column(values: Mapping[str, Scalar]) -> str:
    """Return the column of rejected answers; empty unless training is on preferences."""
    return str(values["data.rejected-column"]) if values["train.objective"] == "dpo" else ""


def number_of_sites(
    source: str, columns: tuple[str, str, str], may_load: bool, rejected: str = ""
) -> int | None:
    """Return the number of values of the last column; None if the data cannot be used.

    Parameters
    ----------
    rejected
        Column of rejected answers, if the data are preferences.
    """
    from grandrounds.data.survey import survey

    try:
        found = survey(source, *columns, rejected=rejected)
        if found is not None:
            return len(found.usable_by_label)
        if may_load:
            from grandrounds.data.sources import load_pairs, load_rows

            question, answer, column = columns
            if rejected:
                pairs = load_pairs(source, (question, answer, rejected, column))
                return len(pairs.unique(column))
            rows = load_rows(
                source,
                question_column=question,
                answer_column=answer,
                keep_columns=(column,),
            )
            return len(rows.unique(column))
    except DataError:
        return None  # told with its reason when the data are checked
    raise ConfigError(
        f"The number of sites in {source} is unknown before it is read: {columns[2]!r} has one "
        "site for each of its values. Give it as --sites."
    )
