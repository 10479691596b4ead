"""Turns a flat run config into a validated `Config`, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from grandrounds.config import automatic
from grandrounds.config.codecs import COARSE_CODECS, EXACT_CODECS
from grandrounds.config.keys import (
    ALIASES,
    FIELD_OF_KEY,
    SECTIONS,
    Config,
)
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.values import AUTO, OneOf, Range, Scalar, words_of
from grandrounds.errors import ConfigError, nearest


def parse(values: Mapping[str, Scalar], defaults: Mapping[str, Scalar]) -> Config:
    """Validate a flat configuration and return it as dataclasses.

    Parameters
    ----------
    values
        Keys as in pyproject.toml, each with a scalar. Missing keys take their default.
    defaults
        The packaged defaults (`grandrounds.config.recipes.defaults`).

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest suggested), a wrong type, a value that is not
        allowed, or keys that contradict each other.
    """
    for key in values:
        if key not in FIELD_OF_KEY and key not in ALIASES:
            raise ConfigError(
                f"Unknown configuration key {key!r}.{nearest(key, [*FIELD_OF_KEY, *ALIASES])} "
                "docs/configuration.md lists all keys."
            )
    merged = automatic.settle(resolve_aliases({**defaults, **values}, defaults))
    sections = {}
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section, include_extras=True)
        fields = {}
        for field in dataclasses.fields(section):
            key = section.prefix + field.name.replace("_", "-")
            fields[field.name] = check_value(key, merged[key], hints[field.name])
        sections[name] = section(**fields)
    config = Config(**sections)
    if problem := next(contradictions(config), ""):
        raise ConfigError(problem)
    return config


def resolve_aliases(
    merged: Mapping[str, Scalar], defaults: Mapping[str, Scalar]
) -> dict[str, Scalar]:
    """Return the configuration without aliases; an alias that is set overrides a default."""
    out = {k: v for k, v in merged.items() if k not in ALIASES}
    for alias, key in ALIASES.items():
        given = merged.get(alias, "")
        if given == "":
            continue
        if out[key] not in (defaults[key], given):
            raise ConfigError(
                f"{alias} = {given!r} and {key} = {out[key]!r} contradict each other: "
                f"the first is an alias of the second. Set {key} only."
            )
        out[key] = given
    return out


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Return `value` in the field's type, or raise `ConfigError`."""
    base, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    kinds = typing.get_args(base) or (base,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) not in kinds:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        allowed = names[base] if len(kinds) == 1 else str(rules[0])
        if any(isinstance(rule, Range) and rule.auto for rule in rules):
            allowed += f", or '{AUTO}'"
        raise ConfigError(f"{key} = {value!r} has the wrong type: it must be {allowed}.")
    for rule in rules:
        if not rule.admits(value):
            suggestion = ""
            if isinstance(value, str) and isinstance(rule, OneOf):
                suggestion = nearest(value, [str(v) for v in rule.values])
            reason = NOT_HONOURED.get(key, "")
            raise ConfigError(
                f"{key} = {value!r} is not allowed: it must be {rule}.{suggestion}{reason}"
            )
    return value


NOT_HONOURED = {
    "model.lora.peft-use-dora": " DoRA initialises its magnitudes from the base weights, which the"
    " server never loads.",
    "train.training-arguments.fp16": " Half precision would need loss scaling; set"
    " train.training-arguments.bf16 = true, or neither for float32.",
    "train.training-arguments.output-dir": " A site never writes to a path that it was sent; for"
    " the server, set run-directory.",
    "train.training-arguments.learning-rate": " Set train.learning-rate-max and"
    " train.learning-rate-min instead.",
}
"""Why a value that FlowerTune accepts cannot be honoured here, and what to set instead."""


def contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with values that are each allowed but contradict each other."""
    train, arguments, strategy, data = config.train, config.arguments, config.strategy, config.data
    sites = data.num_partitions
    if train.learning_rate_min > train.learning_rate_max:
        yield (
            f"train.learning-rate-min = {train.learning_rate_min:g} exceeds "
            f"train.learning-rate-max = {train.learning_rate_max:g}; swap them or lower it."
        )
    if strategy.name == "fedavg" and strategy.proximal_mu > 0:
        yield (
            f"strategy.proximal-mu = {strategy.proximal_mu:g} does not apply to FedAvg: "
            'set strategy.name = "fedprox", or strategy.proximal-mu = 0.'
        )
    if strategy.name == "fedprox" and strategy.proximal_mu == 0:
        yield (
            "strategy.proximal-mu = 0 reduces FedProx to FedAvg: "
            'set a value above 0 (0.01 is usual), or strategy.name = "fedavg".'
        )
    if arguments.gradient_checkpointing not in ("", config.model.gradient_checkpointing):
        yield (
            "train.training-arguments.gradient-checkpointing = "
            f"{arguments.gradient_checkpointing} and model.gradient-checkpointing = "
            f"{config.model.gradient_checkpointing} contradict each other; use the same value."
        )
    if arguments.max_steps == 0:
        yield (
            "train.training-arguments.max-steps = 0 would train nothing: "
            "use at least 1, or -1 to count epochs."
        )
    if arguments.lr_scheduler_type == "constant" and arguments.warmup_steps > 0:
        yield (
            f"train.training-arguments.warmup-steps = {arguments.warmup_steps} has no effect with "
            'lr-scheduler-type = "constant": use "constant_with_warmup", or warmup-steps = 0.'
        )
    if 0 < arguments.max_steps < arguments.warmup_steps:
        yield (
            f"train.training-arguments.warmup-steps = {arguments.warmup_steps} exceeds max-steps = "
            f"{arguments.max_steps}: warm-up would never end. Lower it, or raise max-steps."
        )
    nobody = f"of data.num-partitions = {sites} sites selects none: use at least {1 / sites:g}"
    if 0 < strategy.fraction_evaluate * sites < 1 - 1e-9:
        yield (
            f"strategy.fraction-evaluate = {strategy.fraction_evaluate:g} {nobody}, "
            "or 0 for no held-out loss."
        )
    if config.cohort_size < 1:
        yield f"strategy.fraction-train = {strategy.fraction_train:g} {nobody}."
    if strategy.fraction_evaluate > 0 and data.held_out_fraction == 0:
        yield (
            f"strategy.fraction-evaluate = {strategy.fraction_evaluate:g} needs held-out examples: "
            "set data.held-out-fraction (0.05 is usual), or strategy.fraction-evaluate = 0."
        )
    if data.partitioner in ("dirichlet", "natural") and not data.partition_by:
        yield f'data.partitioner = "{data.partitioner}" needs data.partition-by, a column name.'
    for key, value, hint in (
        ("model.name", config.model.name, "a Hub name, a folder, or formulary"),
        ("static.dataset.name", config.static.name, "a Hub name, a file, or formulary"),
        ("model.lora.target-modules", config.lora.target_modules, "module names, or auto"),
        ("data.question-column", data.question_column, "a column name"),
        ("data.answer-column", data.answer_column, "a column name"),
    ):
        if not value:
            yield f"{key} is empty: set {hint}."
    if strategy.min_sites > sites:
        yield (
            f"strategy.min-sites = {strategy.min_sites} exceeds data.num-partitions = {sites}: "
            "lower it, or set 0 for all sites."
        )
    yield from _rule_contradictions(config)
    yield from _codec_contradictions(config)


def _rule_contradictions(config: Config) -> Iterator[str]:
    """Yield settings that the aggregation rule cannot work with."""
    strategy, rank, cohort = config.strategy, config.lora.peft_lora_r, config.cohort_size
    name, needed = strategy.name, strategy.needed_replies
    ranks = words_of(strategy.site_ranks)
    mixed = [rule for rule, requires in STRATEGIES.items() if requires.mixed_ranks]
    if ranks and name not in mixed:
        yield (
            f'strategy.site-ranks needs strategy.name = "{mixed[0]}": {name} averages tensors of '
            "equal shape. Change the rule, or leave site-ranks empty."
        )
    if not all(r.isascii() and r.isdigit() and 1 <= int(r) <= rank for r in ranks):
        yield (
            f"strategy.site-ranks = {strategy.site_ranks!r} is not allowed: it must be integers "
            f"from 1 to model.lora.peft-lora-r = {rank}, comma-separated."
        )
    if ranks and config.defence.min_cosine > -1:
        yield (
            f"defence.min-cosine = {config.defence.min_cosine:g} cannot compare updates of "
            "different ranks: set it to -1, or leave strategy.site-ranks empty."
        )
    if STRATEGIES[name].stacks and config.max_rank < rank:
        yield (
            f"strategy.max-rank = {strategy.max_rank} is below model.lora.peft-lora-r = {rank}: "
            "the stack must hold at least one site's adapter. Raise it, or set 0."
        )
    if STRATEGIES[name].stacks and config.arguments.weight_decay > 0:
        yield (
            f"train.training-arguments.weight-decay = {config.arguments.weight_decay:g} would "
            "shrink the stack that flora keeps frozen; set it to 0."
        )
    if 0 < cohort < needed:
        yield (
            f"strategy.name = {name!r} needs at least {needed} updates per round with its "
            f"{' and '.join(STRATEGIES[name].keys)} as set, but the cohort is {cohort}: raise "
            "strategy.fraction-train, or lower what the rule needs."
        )
    if name == "fedtrimmedavg" and strategy.trimmed_share == 0:
        yield (
            "strategy.trimmed-share = 0 trims nothing: use a fraction above 0, or "
            'strategy.name = "fedavg".'
        )


def _codec_contradictions(config: Config) -> Iterator[str]:
    """Yield codecs that do not work with the aggregation rule or with each other."""
    how, name = config.communication, config.strategy.name
    rewrites = not STRATEGIES[name].error_feedback
    if rewrites and how.uplink_codec in COARSE_CODECS:
        yield (
            f"communication.uplink-codec = {how.uplink_codec!r} needs error feedback, which {name} "
            "does not allow since it recomputes the factors in every round: use int8, int4 or "
            "bf16, or another strategy.name."
        )
    if how.downlink == "incremental" and (rewrites or how.downlink_codec in EXACT_CODECS):
        yield (
            f'communication.downlink = "incremental" saves nothing for {name} with downlink-codec '
            f"= {how.downlink_codec!r}: it needs a lossy codec, and a rule that does not recompute "
            'the factors in every round. Change either, or set "complete".'
        )
    if how.downlink == "complete" and how.downlink_codec in COARSE_CODECS:
        yield (
            f"communication.downlink-codec = {how.downlink_codec!r} is too coarse to train on a "
            'complete adapter: use int8, int4 or bf16, or communication.downlink = "incremental".'
        )
