"""A site's examples, ready for the model: loaded, split and tokenised once per process."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from grandrounds.config.keys import Config, DataConfig
from grandrounds.config.values import words_of
from grandrounds.data.chat import NOT_A_PREFIX, chat_format
from grandrounds.data.examples import Examples, SiteData, split_rows
from grandrounds.data.on_demand import OnDemand
from grandrounds.data.own_prompt import columns_apart
from grandrounds.data.partitioning import Division, Partition, partition_rows
from grandrounds.data.rows import Rows
from grandrounds.data.sources import load_pairs, load_rows
from grandrounds.data.tokenization import TokenizedExample, tokenize_examples
from grandrounds.errors import DataError
from grandrounds.model.tokenizers import dated_tokenizer
from grandrounds.site.private.units import UnitRule, split_by_unit
from grandrounds.wire.names import clean_name
from grandrounds.wire.subgroups import LEAST, tellable
from grandrounds.wire.told import OF_TEXTS


@dataclass(frozen=True)
class Site:
    """A site's examples."""

    partition_id: int
    """The site's number, from 0."""
    train: Sequence[TokenizedExample]
    """Training examples."""
    held_out: Sequence[TokenizedExample]
    """Held-out examples, never trained on."""
    report: dict[str, int]
    """Counts, under their names in messages: rows, empty-rows, duplicate-rows, truncated,
    unlearnable, train-examples, held-out-examples. Rows = empty + duplicate + unlearnable + train
    + held-out. Of examples tokenised on demand, `truncated` is unknown and left out."""
    name: str = ""
    """What the data call it: the value of `data.partition-by` under natural partitioning."""
    data_commit: str = ""
    """Commit of the hub's data set, where it is known."""
    units: tuple[int, ...] = ()
    """Number of each training example's unit, from 0; empty: visits are not private."""
    held_out_rows: tuple[int, ...] = ()
    """Position of each held-out example among the site's rows; empty where they are not known."""
    subgroups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name → positions among the held-out examples, of the subgroups whose loss may be told."""

    @cached_property
    def tag(self) -> str:
        """16 hex digits that change with any example, its order, or its side of the split.

        Of examples tokenised on demand they are those of the texts, and begin with `t`.
        """
        digest, of_texts = hashlib.sha256(), False
        for side in (self.train, self.held_out):
            digest.update(f"{len(side)}\0".encode())
            if isinstance(side, OnDemand):
                digest.update(side.digests.tobytes())
                of_texts = True
                continue
            for example in side:
                counts = [len(example.input_ids), example.prompt_tokens]
                earlier = [place for span in example.earlier for place in span]
                other = [len(example.rejected), *example.rejected] if example.rejected else []
                told = array("q", [*counts, *example.input_ids, *earlier, *other])
                digest.update(told.tobytes())
        return OF_TEXTS * of_texts + digest.hexdigest()[:16]

    def tokens(self) -> Iterator[Sequence[int]]:
        """Yield the token ids of each example that is tokenised already."""
        for side in (self.train, self.held_out):
            if not isinstance(side, OnDemand):
                yield from (answer.input_ids for e in side for answer in e.answers)


@dataclass(frozen=True)
class Source:
    """What determines the examples of a run's sites, besides the rows."""

    data: DataConfig
    """Division, columns, prompt and held-out fraction."""
    model_name: str
    """What loads the base, with a revision where the run has one."""
    seq_length: int
    """Maximum sequence length in tokens."""
    seed: int
    """The run's seed."""
    units: UnitRule | None = None
    """The units of a private run."""

    @classmethod
    def of(cls, config: Config) -> Source:
        """Return that of a configured run."""
        units = UnitRule.of_rehearsal(config) if config.is_private else None
        name, length = config.model.source, config.train.seq_length
        return cls(config.data, name, length, config.federation.seed, units)


def site_of(config: Config, partition_id: int) -> Site:
    """Return a site of a run on the data that its configuration names, with tokenised examples.

    Raises
    ------
    DataError
        If the source cannot be used, or the site has no training example with an answer.
    """
    return _open(rows_of_run(config), Source.of(config), partition_id)


def open_site(
    source: str, data: DataConfig, model_name: str, seq_length: int, seed: int, partition_id: int
) -> Site:
    """Return a site's tokenised examples without units; raise `DataError` as `site_of` does.

    Parameters
    ----------
    source, model_name : str
        What loads data and base, with a revision where the run has one.
    """
    how = Source(data, model_name, seq_length, seed)
    return _open(_rows(source, data), how, partition_id)


def rows_of_run(config: Config) -> Rows:
    """Return all rows of a run's source, with the columns that it reads."""
    data = config.data
    if config.is_on_pairs:
        texts = (data.question_column, data.answer_column, data.rejected_column)
        return load_pairs(config.static.source, (*texts, *filter(None, [data.partition_by])))
    column = config.privacy.unit_column if config.is_private else ""
    return _rows(config.static.source, data, column)


def _rows(source: str, data: DataConfig, unit_column: str = "") -> Rows:
    subgroups = words_of(data.subgroup_columns)
    columns = (data.partition_by, unit_column, *subgroups, *columns_apart(data.prompt_template))
    return load_rows(
        source,
        question_column=data.question_column,
        answer_column=data.answer_column,
        keep_columns=tuple(dict.fromkeys(filter(None, columns))),
    )


@lru_cache(maxsize=1024)
def _open(
    rows: Rows,  # by identity: load_rows returns the same object for an unchanged source
    source: Source,
    partition_id: int,
) -> Site:
    data = source.data
    own_rows, split = split_site(rows, source, partition_id)
    site = tokenized_site(split, partition_id, source.model_name, data, source.seq_length)
    site = replace(site, data_commit=rows.commit)
    site = with_subgroups(site, own_rows, words_of(data.subgroup_columns))
    if data.partitioner != "natural":
        return site
    return replace(site, name=natural_name(data.partition_by, own_rows[data.partition_by][0]))


def with_subgroups(site: Site, own_rows: Rows, columns: Sequence[str], least: int = LEAST) -> Site:
    """Return a site with the subgroups of its held-out examples that may be told.

    Parameters
    ----------
    least : int
        Examples below which nothing is told.

    Raises
    ------
    DataError
        If the rows are on the disk, where examples are read one by one.
    """
    if not columns or not site.held_out:
        return site
    if own_rows.is_stored:
        raise DataError(
            f"data.subgroup-columns = {','.join(columns)!r}: of data that are too large for the "
            "memory no subgroups are told. Leave it out, or use fewer rows."
        )
    values = {c: [own_rows[c][row] for row in site.held_out_rows] for c in columns}
    return replace(site, subgroups=tellable(values, least))


def split_site(rows: Rows, source: Source, partition_id: int) -> tuple[Rows, SiteData]:
    """Return a site's rows among all rows of a source, and its examples as text.

    Raises
    ------
    DataError
        If the rows cannot be divided, or no training example is left.
    """
    data = source.data
    partition = Partition(source.seed, partition_id, data.num_partitions)
    division = Division(data.partitioner, data.partition_by, data.dirichlet_alpha)
    own_rows = partition_rows(rows, division, partition)
    if source.units:
        return own_rows, split_by_unit(
            own_rows,
            source.units,
            question_column=data.question_column,
            answer_column=data.answer_column,
            fraction=data.held_out_fraction,
        )
    split = split_rows(
        own_rows,
        partition,
        question_column=data.question_column,
        answer_column=data.answer_column,
        held_out_fraction=data.held_out_fraction,
    )
    return own_rows, split


def natural_name(column: str, value: object) -> str:
    """Return what a column's value calls a site: `Ward B`, and for a number `ward 7`."""
    name = str(value).strip()
    is_number = name.replace(".", "", 1).removeprefix("-").isdigit()
    return clean_name(f"{column} {name}" if is_number else name)


@lru_cache(maxsize=4)
def _note_format(model_name: str, tokenizer: Any) -> None:
    """Say once in a process if a chat template renders a finished turn differently."""
    if tokenizer.chat_template and not chat_format(tokenizer).is_prefix:
        print(f"grandrounds: chat template of {model_name!r}: {NOT_A_PREFIX}.", file=sys.stderr)


def tokenized_site(
    split: SiteData,
    partition_id: int,
    model_name: str,
    data: DataConfig,
    seq_length: int,
    *,
    alone: bool = False,
) -> Site:
    """Return a site's tokenised examples.

    Parameters
    ----------
    data : DataConfig
        Of the run: only the prompt is read.
    alone : bool
        Whether no record may decide anything about the others or about the site: one that the
        template cannot render is left out, and a site without a training example is none too few.
        Errors would tell the server whether a record is longer than the length that it chose, or a
        conversation where the prompt that it chose has no room for one.

    Raises
    ------
    DataError
        If no training example is left.
    """
    tokenizer, template = dated_tokenizer(model_name, data), data.prompt
    if template == "chat":
        _note_format(model_name, tokenizer)
    if isinstance(split.train, Examples) and isinstance(split.held_out, Examples):
        how = tokenizer, template, seq_length, data.train_on
        on_demand = OnDemand(split.train, *how), OnDemand(split.held_out, *how)
        return _on_demand(split, partition_id, on_demand, seq_length)
    train, held_out = (
        tokenize_examples(side, tokenizer, template, seq_length, data.train_on, alone)
        for side in (split.train, split.held_out)
    )
    if template == "text" and (cut := train.truncated + held_out.truncated) and not alone:
        print(
            f"grandrounds: site {partition_id}: {cut:,} texts are longer than train.seq-length = "
            f"{seq_length} tokens: the rest of them is not trained on.",
            file=sys.stderr,
        )
    if shortened := train.shortened + held_out.shortened:
        print(
            f"grandrounds: site {partition_id}: of {shortened:,} answers the chat template of "
            f"{model_name!r} leaves out a part, such as reasoning: only the rest is trained on.",
            file=sys.stderr,
        )
    if unlearned := train.unlearned + held_out.unlearned:
        print(
            f"grandrounds: site {partition_id}: the chat template of {model_name!r} renders "
            f"{unlearned:,} earlier answers differently once a conversation goes on: of these "
            "conversations only the last answer is learned.",
            file=sys.stderr,
        )
    if not train.examples and not alone:
        raise _none_left(split, partition_id, seq_length)
    unlearnable = train.unlearnable + held_out.unlearnable
    report = _report(split, len(train.examples), len(held_out.examples), unlearnable)
    report["truncated"] = train.truncated + held_out.truncated
    units = _renumbered([split.units[i] for i in train.positions]) if split.units else ()
    places = split.held_out_rows and tuple(split.held_out_rows[i] for i in held_out.positions)
    return Site(
        *(partition_id, train.examples, held_out.examples, report),
        units=units,
        held_out_rows=places,
    )


def _on_demand(
    split: SiteData, partition_id: int, sides: tuple[OnDemand, OnDemand], seq_length: int
) -> Site:
    """Return a site whose examples are tokenised when a visit needs them."""
    train, held_out = sides
    if not train:
        raise _none_left(split, partition_id, seq_length)
    unlearnable = train.unlearnable + held_out.unlearnable
    return Site(
        partition_id, train, held_out, _report(split, len(train), len(held_out), unlearnable)
    )


def _none_left(split: SiteData, partition_id: int, seq_length: int) -> DataError:
    return DataError(
        f"Site {partition_id} has no example left for training: the prompts of all its "
        f"{len(split.train)} examples fill train.seq-length = {seq_length} tokens. Raise it."
    )


def _report(split: SiteData, train: int, held_out: int, unlearnable: int) -> dict[str, int]:
    """Return the counts of a site, under their names in messages."""
    report = {name.replace("_", "-"): count for name, count in asdict(split.report).items()}
    report |= {"train-examples": train, "held-out-examples": held_out}
    return {**report, "unlearnable": unlearnable}


def _renumbered(units: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of units without gaps, where some have no example that can be learned."""
    number = {unit: position for position, unit in enumerate(dict.fromkeys(units))}
    return tuple(number[unit] for unit in units)
