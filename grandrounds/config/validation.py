"""From a flat run config to a checked `Config`, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from grandrounds.config.codecs import COARSE_CODECS, EXACT_CODECS
from grandrounds.config.keys import (
    ALIASES,
    FIELD_OF_KEY,
    SECTIONS,
    Config,
)
from grandrounds.config.strategies import STRATEGIES, needed_replies
from grandrounds.config.values import OneOf, Scalar, words_of
from grandrounds.errors import ConfigError, nearest


def parse(values: Mapping[str, Scalar], defaults: Mapping[str, Scalar]) -> Config:
    """Check a flat configuration and return it as dataclasses.

    Parameters
    ----------
    values
        Keys as in pyproject.toml, each with a scalar. Keys that are left out take `defaults`.
    defaults
        The packaged defaults (`grandrounds.config.recipes.defaults`).

    Raises
    ------
    ConfigError
        For an unknown key (the nearest is suggested), a wrong type, a value that is not allowed,
        or two keys that contradict each other.
    """
    for key in values:
        if key not in FIELD_OF_KEY and key not in ALIASES:
            raise ConfigError(
                f"Unknown configuration key {key!r}.{nearest(key, [*FIELD_OF_KEY, *ALIASES])} "
                "All keys are listed in docs/configuration.md."
            )
    merged = resolve_aliases({**defaults, **values}, defaults)
    sections = {}
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section, include_extras=True)
        fields = {}
        for field in dataclasses.fields(section):
            key = section.prefix + field.name.replace("_", "-")
            fields[field.name] = check_value(key, merged[key], hints[field.name])
        sections[name] = section(**fields)
    config = Config(**sections)
    check_together(config)
    return config


def resolve_aliases(
    merged: Mapping[str, Scalar], defaults: Mapping[str, Scalar]
) -> dict[str, Scalar]:
    """Return the configuration under today's names; an alias that is set wins over a default."""
    out = {k: v for k, v in merged.items() if k not in ALIASES}
    for alias, key in ALIASES.items():
        given = merged.get(alias, "")
        if given == "":
            continue
        if out[key] not in (defaults[key], given):
            raise ConfigError(
                f"{alias} = {given!r} and {key} = {out[key]!r} contradict each other: "
                f"the first is another name of the second. Give {key} alone."
            )
        out[key] = given
    return out


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Return `value` in the type that the field asks for, or raise `ConfigError`."""
    base, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    kinds = typing.get_args(base) or (base,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) not in kinds:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        allowed = names[base] if len(kinds) == 1 else str(rules[0])
        raise ConfigError(f"{key} = {value!r} is of the wrong type: it must be {allowed}.")
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
    "model.lora.peft-use-dora": " DoRA's magnitudes start from the base weights, which the server"
    " never loads; set it to false.",
    "train.training-arguments.fp16": " Half precision would need loss scaling; use"
    " train.training-arguments.bf16 = true, or neither for float32.",
    "train.training-arguments.output-dir": " A site never writes to a path that it was sent;"
    " set run-directory for the server.",
    "train.training-arguments.learning-rate": " The round's rate comes from"
    " train.learning-rate-max and train.learning-rate-min.",
}
"""Why a value that another system takes cannot be honoured here, and what to set instead."""


def check_together(config: Config) -> None:
    """Raise `ConfigError` where values are fine one by one but contradict each other."""
    train, arguments, strategy = config.train, config.arguments, config.strategy
    problems = [
        (
            train.learning_rate_min > train.learning_rate_max,
            f"train.learning-rate-min = {train.learning_rate_min:g} is above "
            f"train.learning-rate-max = {train.learning_rate_max:g}; swap or lower it.",
        ),
        (
            strategy.name == "fedavg" and strategy.proximal_mu > 0,
            f"strategy.proximal-mu = {strategy.proximal_mu:g} has no place in FedAvg: "
            'set strategy.name = "fedprox", or strategy.proximal-mu = 0.',
        ),
        (
            strategy.name == "fedprox" and strategy.proximal_mu == 0,
            "strategy.proximal-mu = 0 makes FedProx the same as FedAvg: "
            'set a value above 0 (0.01 is usual), or strategy.name = "fedavg".',
        ),
        (
            arguments.gradient_checkpointing not in ("", config.model.gradient_checkpointing),
            "train.training-arguments.gradient-checkpointing = "
            f"{arguments.gradient_checkpointing} and model.gradient-checkpointing = "
            f"{config.model.gradient_checkpointing} contradict each other; set both alike.",
        ),
        (
            arguments.max_steps == 0,
            "train.training-arguments.max-steps = 0 would train nothing: "
            "give at least 1, or -1 to count epochs.",
        ),
        (
            arguments.lr_scheduler_type == "constant" and arguments.warmup_steps > 0,
            f"train.training-arguments.warmup-steps = {arguments.warmup_steps} has no effect with "
            'lr-scheduler-type = "constant": use "constant_with_warmup", or warmup-steps = 0.',
        ),
        (
            0 < arguments.max_steps < arguments.warmup_steps,
            f"train.training-arguments.warmup-steps = {arguments.warmup_steps} is more than "
            f"max-steps = {arguments.max_steps}: the learning rate would never be reached.",
        ),
        (
            0 < strategy.fraction_evaluate * config.data.num_partitions < 1 - 1e-9,
            f"strategy.fraction-evaluate = {strategy.fraction_evaluate:g} of data.num-partitions = "
            f"{config.data.num_partitions} sites is nobody: at least "
            f"{1 / config.data.num_partitions:g} is needed, or 0 for no held-out loss.",
        ),
        (
            config.cohort_size < 1,
            f"strategy.fraction-train = {strategy.fraction_train:g} of data.num-partitions = "
            f"{config.data.num_partitions} sites is nobody: at least "
            f"{1 / config.data.num_partitions:g} is needed.",
        ),
        (
            strategy.fraction_evaluate > 0 and config.data.held_out_fraction == 0,
            f"strategy.fraction-evaluate = {strategy.fraction_evaluate:g} needs held-out examples: "
            "set data.held-out-fraction (0.05 is usual), or strategy.fraction-evaluate = 0.",
        ),
        (
            config.data.partitioner in ("dirichlet", "natural") and not config.data.partition_by,
            f'data.partitioner = "{config.data.partitioner}" needs data.partition-by, '
            "the name of a column.",
        ),
        *(
            (not value, f"{key} is empty: {hint}")
            for key, value, hint in (
                ("model.name", config.model.name, "give a hub name, a folder, or formulary."),
                (
                    "static.dataset.name",
                    config.static.name,
                    "give a hub name, a file, or formulary.",
                ),
                ("model.lora.target-modules", config.lora.target_modules, "give names, or auto."),
                ("data.question-column", config.data.question_column, "give a column's name."),
                ("data.answer-column", config.data.answer_column, "give a column's name."),
            )
        ),
        (
            strategy.min_sites > config.data.num_partitions,
            f"strategy.min-sites = {strategy.min_sites} is more than data.num-partitions = "
            f"{config.data.num_partitions}: lower it, or set 0 for all.",
        ),
        *_rule_problems(config),
        *_communication_problems(config),
    ]
    for is_wrong, message in problems:
        if is_wrong:
            raise ConfigError(message)


def _rule_problems(config: Config) -> list[tuple[bool, str]]:
    """Return what an aggregation rule cannot work with, as (is wrong, message)."""
    strategy, rank, cohort = config.strategy, config.lora.peft_lora_r, config.cohort_size
    name = strategy.name
    ranks = words_of(strategy.site_ranks)
    are_ranks = all(r.isascii() and r.isdigit() and 1 <= int(r) <= rank for r in ranks)
    mixed = [rule for rule, asks in STRATEGIES.items() if asks.mixed_ranks]
    needed = needed_replies(strategy)
    return [
        (
            bool(ranks) and name not in mixed,
            f'strategy.site-ranks needs strategy.name = "{mixed[0]}": {name} averages tensors of '
            "one shape. Change the rule, or leave site-ranks empty.",
        ),
        (
            not are_ranks,
            f"strategy.site-ranks = {strategy.site_ranks!r} is not allowed: it must be whole "
            f"numbers from 1 to model.lora.peft-lora-r = {rank}, with commas.",
        ),
        (
            bool(ranks) and config.defence.min_cosine > -1,
            f"defence.min-cosine = {config.defence.min_cosine:g} cannot compare updates of "
            "different ranks: set it to -1, or leave strategy.site-ranks empty.",
        ),
        (
            name == "flora" and config.max_rank < rank,
            f"strategy.max-rank = {strategy.max_rank} is below model.lora.peft-lora-r = {rank}: "
            "the stack must hold at least one site's adapter. Raise it, or set 0.",
        ),
        (
            name == "flora" and config.arguments.weight_decay > 0,
            f"train.training-arguments.weight-decay = {config.arguments.weight_decay:g} would "
            "shrink the stack that flora keeps frozen; set it to 0.",
        ),
        (
            0 < cohort < needed,
            f"strategy.name = {name!r} needs at least {needed} replies a round with its "
            f"{' and '.join(STRATEGIES[name].keys)} as set, but only {cohort} sites train: raise "
            "strategy.fraction-train, or change what the rule expects.",
        ),
        (
            name == "fedtrimmedavg" and strategy.trimmed_share == 0,
            "strategy.trimmed-share = 0 trims no reply: give a share above 0, or "
            'strategy.name = "fedavg".',
        ),
    ]


def _communication_problems(config: Config) -> list[tuple[bool, str]]:
    """Return which encodings do not work together, as (is wrong, message)."""
    how, name = config.communication, config.strategy.name
    rewrites = not STRATEGIES[name].error_feedback
    return [
        (
            rewrites and how.uplink_codec in COARSE_CODECS,
            f"communication.uplink-codec = {how.uplink_codec!r} needs what it loses to be sent "
            f"later, but {name} writes the factors anew in every round: use int8, int4 or bf16, or "
            "another strategy.name.",
        ),
        (
            how.downlink == "incremental" and (rewrites or how.downlink_codec in EXACT_CODECS),
            f'communication.downlink = "incremental" does not serve {name} with downlink-codec = '
            f"{how.downlink_codec!r}: it saves nothing where nothing is lost, or where the "
            'server writes the factors anew. Choose a codec and another rule, or set "complete".',
        ),
        (
            how.downlink == "complete" and how.downlink_codec in COARSE_CODECS,
            f"communication.downlink-codec = {how.downlink_codec!r} keeps too little of a complete "
            "adapter to train on; use int8, int4 or bf16, or communication.downlink = "
            '"incremental".',
        ),
    ]
