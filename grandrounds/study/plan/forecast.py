"""Forecasts a run's traffic, memory and coverage from its configuration alone."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from grandrounds.config.codecs import COARSE_CODECS, CODECS, EXACT_CODECS
from grandrounds.config.keys import TRAIN, Config
from grandrounds.config.recipes import LEADERBOARD_DATA
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.embedded import EMBEDDED, embedded_rows
from grandrounds.data.formulary import FORMULARY
from grandrounds.data.places import SURVEYED_BYTES, looks_like_path
from grandrounds.data.streams import is_read_by_rows
from grandrounds.data.survey import survey
from grandrounds.errors import DataError, first_line
from grandrounds.model import memory
from grandrounds.model.architectures import (
    Architecture,
    adapter_shapes,
    find_architecture,
    target_modules,
)
from grandrounds.model.memory import SiteMemory, precision_of, site_memory
from grandrounds.model.patterns import ALPHA_PATTERN, RANK_PATTERN, Table, check_patterns
from grandrounds.server.described import named_start
from grandrounds.study.plan import masks, privacy
from grandrounds.wire.adapter import A, Shapes, at_rank, count_parameters
from grandrounds.wire.schedule import cohorts_of, examples_of_a_visit
from grandrounds.wire.traffic import Plan, plan_config

LEADERBOARD_ROWS = 33_955
"""Rows of the medical leaderboard's training data, medalpaca/medical_meadow_medical_flashcards."""


@dataclass(frozen=True)
class Reading:
    """Training data seen by the end of a run, if no row is empty or a duplicate."""

    rows: int
    """Rows of the data."""
    train_examples: int
    """Training examples of all sites."""
    examples_per_visit: int
    """Examples per visit, averaged over the sites."""
    examples_seen: int
    """Examples in all visits, including repeats."""
    share_covered: float
    """Share of the training examples seen at least once, given the seed's cohorts."""
    sizes_known: bool
    """Whether the configuration determines the sites' sizes; otherwise they are assumed equal."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run."""

    config: Config
    architecture: Architecture
    targets: list[str]
    shapes: Shapes
    """Shapes of the adapter's tensors."""
    plan: Plan
    site: SiteMemory
    """Memory of a site on a GPU with bfloat16; without gradient checkpointing if it is `auto`."""
    server_bytes: int
    """Peak memory of adapter tensors on the server."""
    reading: Reading | None
    """None if the number of rows is unknown."""

    @cached_property
    def codecs(self) -> dict[str, Plan]:
        """The run's traffic under every codec; see `by_codec`. A masked run can have no other."""
        return {} if self.config.is_masked else by_codec(self, tuple(CODECS))

    @cached_property
    def privacy(self) -> privacy.PrivacyPlan | None:
        """What the recipe guarantees to a unit of a site; None if it is not private."""
        return privacy.privacy_plan(self.config, self.shapes)


def forecast(
    config: Config,
    *,
    architecture: str | None = None,
    rows: int | None = None,
) -> Forecast:
    """Forecast a run without loading or downloading anything.

    Parameters
    ----------
    architecture : str, optional
        A known base with the same shapes, if `model.name` is unknown.
    rows : int, optional
        Number of rows, for data that cannot be counted.

    Raises
    ------
    ModelError
        If the base's shapes are unknown, a target is not one of its linear modules, or a pattern
        of ranks or alphas matches none of the adapted ones.
    DataError
        If a local file cannot be read.
    """
    base = find_architecture(architecture or config.model.name)
    if architecture and config.model.name != FORMULARY:
        base = replace(base, name=config.model.name)
    targets = target_modules(base, config.lora.target_modules)
    lora = config.lora
    tables: dict[str, Table[int] | Table[float]] = {
        RANK_PATTERN: (ranks := tuple(lora.ranks_by_pattern.items())),
        ALPHA_PATTERN: tuple(lora.alphas_by_pattern.items()),
    }
    shapes = adapter_shapes(
        base, targets, lora.peft_lora_r, rank_pattern=ranks, dora=lora.peft_use_dora
    )
    paths = [name.removeprefix("base_model.model.").removesuffix(A) for name in shapes if A in name]
    check_patterns(tables, paths, base.name)
    counted = rows if rows is not None else rows_of(config)
    return Forecast(
        config=config,
        architecture=base,
        targets=targets,
        shapes=shapes,
        plan=plan_config(config, shapes),
        site=site_memory(
            config,
            base,
            targets,
            precision_of(config),
            checkpointing=config.model.gradient_checkpointing is True,
        ),
        server_bytes=server_memory(config, shapes),
        reading=None if counted is None else reading(config, counted),
    )


# --- Memory ---------------------------------------------------------------------------------------


def server_memory(config: Config, shapes: Shapes) -> int:
    """Return the peak memory of adapter tensors on the server, in bytes."""
    rule = STRATEGIES[config.strategy.name]
    if rule.stacks:
        shapes = at_rank(shapes, config.max_rank)
    remembers = config.communication.downlink == "incremental"
    holds = config.defence.screens
    velocity = 4 * count_parameters(shapes) if config.strategy.outer_nesterov else 0
    return velocity + memory.server_bytes(
        count_parameters(shapes),
        cohort=config.cohort_size,
        keeps_replies=rule.keeps_replies or holds,
        measures_product=rule.mean_of_factors,
        sites_remembered=config.data.num_partitions if remembers else 0,
    )


# --- Data -----------------------------------------------------------------------------------------


_BEGINNING_CHARACTERS = 1024


def rows_of(config: Config) -> int | None:
    """Count the rows of a run's data; None if they would have to be loaded, or a part is chosen.

    Raises
    ------
    DataError
        If a local file cannot be read.
    """
    data, static = config.data, config.static
    if not looks_like_path(static.name):
        chosen = static.config or static.split != TRAIN
        return None if chosen else count_rows(static.name)
    named = data.question_column, data.answer_column, data.partition_by
    rejected = data.rejected_column if config.is_on_pairs else ""
    found = survey(static.name, *named, data.prompt_template, rejected)
    return count_rows(static.name) if found is None else found.rows


def count_rows(source: str) -> int | None:
    """Count the rows of a data source; None if it would have to be loaded.

    Raises
    ------
    DataError
        If a local file cannot be read.
    """
    if source in EMBEDDED:
        return len(embedded_rows(source))
    if source in LEADERBOARD_DATA:
        return LEADERBOARD_ROWS
    path = Path(source).expanduser()
    name = path.name.lower().removesuffix(".gz")
    if not path.is_file() or not name.endswith((".json", ".jsonl", ".csv")):
        return None
    try:
        if path.stat().st_size > SURVEYED_BYTES and not is_read_by_rows(path):
            return None
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return _rows_of(name, file)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read: {first_line(error)}. Correct it, or use --rows."
        ) from error


def _rows_of(name: str, file: IO[str]) -> int:
    if name.endswith(".csv"):
        return max(0, sum(1 for row in csv.reader(file) if row) - 1)
    if name.endswith(".json"):
        content = file.read(_BEGINNING_CHARACTERS)
        if content.lstrip().startswith("["):
            return len(json.loads(content + file.read()))
        file.seek(0)
    return sum(1 for line in file if line.strip())


def reading(config: Config, rows: int) -> Reading:
    """Return how much of the data the sites will have seen.

    A site's cursor advances through its examples without repeats: after v visits of e examples, it
    has seen the share min(1, v e / n) of its n examples. Visits follow from the seed's cohorts.
    """
    data = config.data
    sizes = [kept_rows(size, data.held_out_fraction) for size in site_sizes(config, rows)]
    visits = Counter(site for cohort in cohorts_of(config) for site in cohort)
    taken = [examples_of_a_visit(config, size) for size in sizes]
    seen = covered = 0
    for site, count in visits.items():
        seen += count * taken[site]
        different = taken[site] * (count if config.train.dynamic_data_seed else 1)
        covered += min(sizes[site], different)
    total = sum(sizes)
    return Reading(
        rows=rows,
        train_examples=total,
        examples_per_visit=round(sum(taken) / len(taken)),
        examples_seen=seen,
        share_covered=covered / total if total else 0.0,
        sizes_known=data.partitioner in ("iid", "size-skewed") or config.is_embedded_by_site,
    )


def site_sizes(config: Config, rows: int) -> list[int]:
    """Return the rows of each site: equal up to one row, or proportional to site + 1.

    The sites of built-in data have as many rows each.
    """
    sites = config.data.num_partitions
    if config.data.partitioner == "size-skewed":
        units = sites * (sites + 1) // 2
        return [rows * (site + 1) // units for site in range(sites)]
    return [rows // sites + (site < rows % sites) for site in range(sites)]


def kept_rows(rows: int, held_out_fraction: float) -> int:
    """Return the number of a site's rows that are not held out."""
    if not held_out_fraction or rows < 2:
        return rows
    return rows - max(1, round(held_out_fraction * rows))


# --- Codecs, links and JSON -----------------------------------------------------------------------


def by_codec(forecast: Forecast, codecs: tuple[str, ...]) -> dict[str, Plan]:
    """Return the run's traffic under each codec, both ways; coarse codecs with int4 down.

    Coarse codecs are omitted for strategies without error feedback. A run that goes on from a saved
    adapter has a lossless downlink.
    """
    config = forecast.config
    plans = {}
    for name in codecs:
        down = "int4" if name in COARSE_CODECS else name
        if name in COARSE_CODECS and not STRATEGIES[config.strategy.name].error_feedback:
            continue
        if config.lora.is_continued and down not in EXACT_CODECS:
            down = "none"
        how = replace(
            config.communication, uplink_codec=name, downlink_codec=down, downlink="complete"
        )
        label = name if down == name else f"{name} up, {down} down"
        plans[label] = plan_config(replace(config, communication=how), forecast.shapes)
    return plans


def link_seconds(plan: Plan, uplink_mbps: float, downlink_mbps: float) -> dict[str, float]:
    """Return the transfer time of adapters over a link in seconds, without latency and overhead.

    `round`: one message down and one up, the largest of any round. `all-rounds`: the sum over
    rounds of the largest message each way, as for a site that is selected in every round.
    """

    def seconds(down: int, up: int) -> float:
        return 8 * (down / downlink_mbps + up / uplink_mbps) / 1e6

    each = [seconds(down, up) for down, up in zip(plan.down_bytes, plan.up_bytes, strict=True)]
    return {"round": max(each), "all-rounds": sum(each)}


def as_dict(forecast: Forecast) -> Mapping[str, Any]:
    """Return a forecast as JSON values."""
    base, config = forecast.architecture, forecast.config
    return {
        "model": base.name,
        "architecture": base.known_as,
        "base-parameters": base.parameters,
        "target-modules": forecast.targets,
        "rank": config.lora.peft_lora_r,
        "dora": config.lora.peft_use_dora,
        "rounds": config.federation.num_server_rounds,
        "sites": config.data.num_partitions,
        "cohort": config.cohort_size,
        "devices": config.train.devices,
        "strategy": config.strategy.name,
        **({"from-adapter": named_start(config)} if config.lora.is_continued else {}),
        "communication": forecast.plan.as_dict(),
        "site-memory-bytes": {**asdict(forecast.site), "total": forecast.site.total},
        "server-adapter-bytes": forecast.server_bytes,
        "reading": forecast.reading and asdict(forecast.reading),
        **({"masks": masks.as_dict(config)} if config.is_masked else {}),
        **({"privacy": privacy.as_dict(forecast.privacy)} if forecast.privacy else {}),
    }
