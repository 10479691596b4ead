"""A run's own held-out rows as questions to answer: those that its sites never trained on.

They are read again from the source that the run names, and divided with the run's seed as the sites
did it; so this machine must have the source. In process and in Flower's simulation it has. In a
deployment the rows are at the sites: nothing is asked then, and a file of one's own can be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.data.chat_settings import ChatSettings
from grandrounds.data.examples import Example, SiteData
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.errors import ConfigError, DataError
from grandrounds.model.tokenizers import tokenizer_of
from grandrounds.server.directory import RunDirectory
from grandrounds.site.local_data import Source, rows_of_run, site_of, split_site
from grandrounds.study.evaluation.benchmarks import Item, Task, held_out_benchmark
from grandrounds.study.evaluation.greedy import tokenized
from grandrounds.study.evaluation.tasks import rows_are_elsewhere
from grandrounds.wire.told import DATA_TAG


def check_rows_are_here(run: RunDirectory, config: Config) -> None:
    """Raise `ConfigError` unless the held-out rows of a run can be read on this machine."""
    if rows_are_elsewhere(run, config):
        raise ConfigError(
            f"{run.path} is a run of a deployment: its held-out rows are at the sites, and this "
            "machine has none. Its held-out loss is in metrics.jsonl; to ask questions of your "
            "own, give --benchmark FILE."
        )
    if config.data.prompt_template == "text":
        raise ConfigError(
            f"{run.path} was trained on plain text, so its held-out rows are no questions. Their "
            "loss is in metrics.jsonl; to ask questions of your own, give --benchmark FILE."
        )
    if not config.data.held_out_fraction:
        raise ConfigError(
            f"{run.path} held nothing out (data.held-out-fraction = 0), so there are no rows to "
            "ask. Give --benchmark FILE, or train again with a share held out."
        )


def load_held_out(run: RunDirectory, config: Config, limit: int | None = None) -> Task:
    """Return the held-out rows of a run, site by site in turns.

    Parameters
    ----------
    limit : int, optional
        Maximum number of rows; since sites take turns, all of them are represented.

    Raises
    ------
    ConfigError
        If the rows are not on this machine, or none was held out.
    DataError
        If the source cannot be read, or has changed since the run.
    """
    check_rows_are_here(run, config)
    rows, how = rows_of_run(config), Source.of(config)
    tokenizer = tokenizer_of(config.model.source, ChatSettings(*config.data.chat))
    template = config.data.prompt
    lengths = config.train.seq_length, config.data.train_on
    by_site: list[list[Item]] = []
    splits: list[SiteData] = []
    found: list[dict[str, int]] = []
    for site in range(config.data.num_partitions):
        _, split = split_site(rows, how, site)
        items = [held_out_item(0, example) for example in split.held_out]
        fitting = tokenized(items, tokenizer, template, config.train.seq_length)
        kept = [item for item, fits in zip(items, fitting, strict=True) if fits is not None]
        by_site.append(kept)
        splits.append(split)
        learned = tokenize_examples(split.held_out, tokenizer, template, *lengths)
        found.append({"rows": split.report.rows, "held-out-examples": len(learned.examples)})
    _check_unchanged(run, config, found)
    order = [
        (site, item)
        for turn in zip_longest(*by_site)
        for site, item in enumerate(turn)
        if item is not None
    ]
    if not order:
        raise DataError(
            f"The sites of {run.path} have no held-out rows: their data are too small. Give "
            "--benchmark FILE, or train again with a larger data.held-out-fraction."
        )
    asked = {item.question for _, item in order[:limit]}
    trained = [{e.question for e in split.train if e.question in asked} for split in splits]
    elsewhere = sum(
        any(item.question in questions for other, questions in enumerate(trained) if other != site)
        for site, item in order[:limit]
    )
    items = [replace(item, row=row) for row, (_, item) in enumerate(order, 1)]
    texts = "".join(f"{item.question}\x00{item.options[0]}\x00" for item in items)
    source = {
        "held-out": Path(config.static.name).name,
        "sites": str(config.data.num_partitions),
        "trained-elsewhere": str(elsewhere),
        "rows-sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    return Task(held_out_benchmark(len(items)), tuple(items[:limit]), source)


def held_out_item(row: int, example: Example) -> Item:
    """Return a held-out example as a question."""
    return Item(
        row=row,
        question=example.question,
        options=(example.answer,),
        labels=("answer",),
        gold_index=0,
        before=example.before,
        parts=example.parts,
    )


def _check_unchanged(run: RunDirectory, config: Config, found: Sequence[Mapping[str, int]]) -> None:
    """Raise `DataError` unless every site has as many rows as it introduced itself with."""
    recorded: list[Mapping[str, Any]] = run.read_json("sites.json") or []
    for site in recorded:
        number = int(site["partition-id"])
        for name, count in found[number].items() if number < len(found) else ():
            if int(site[name]) != count:
                raise DataError(
                    f"{config.static.name} has changed since the run: site {number} had "
                    f"{site[name]} {name} and has {count} now, so that rows it trained on could be "
                    "asked as held out. Restore the file, or give --benchmark FILE."
                )
        tag = site.get(DATA_TAG)  # absent in runs of version 0.2.0 and before
        if tag and number < len(found) and site_of(config, number).tag != tag:
            raise DataError(
                f"{config.static.name} has changed since the run: site {number} has other rows, "
                "so that rows it trained on could be asked as held out. Restore the file, or give "
                "--benchmark FILE."
            )
