"""Turns a flat run config into a validated `Config`, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from grandrounds.config import automatic
from grandrounds.config.automatic import EMBEDDED_DATA
from grandrounds.config.bases import names_a_base
from grandrounds.config.codecs import COARSE_CODECS, EXACT_CODECS
from grandrounds.config.keys import (
    ALIASES,
    FIELD_OF_KEY,
    SECTIONS,
    TRAIN,
    Config,
    table_meant,
)
from grandrounds.config.masked import masked_contradictions
from grandrounds.config.personal import personal_contradictions
from grandrounds.config.preferring import preference_contradictions
from grandrounds.config.private import privacy_contradictions
from grandrounds.config.prompt import is_own
from grandrounds.config.resets import resets
from grandrounds.config.schedules import parts_of
from grandrounds.config.starts import refused_start
from grandrounds.config.strategies import PRESETS, STRATEGIES
from grandrounds.config.synonyms import (
    MAX_STEPS,
    NO_KEY,
    PER_ROUND,
    key_meant,
    last_part,
    only_letters,
    value_meant,
)
from grandrounds.config.values import AUTO, OneOf, Range, Scalar, words_of
from grandrounds.errors import ConfigError, documented, nearest
from grandrounds.storage import found


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
        With every problem: unknown keys (with the key that is meant), wrong types, values that are
        not allowed, and keys that contradict each other.
    """
    problems = [unknown_key(key, value) for key, value in values.items() if key not in _KEYS]
    given, clashes = without_aliases({k: v for k, v in values.items() if k in _KEYS}, defaults)
    fields, faults = _checked(given, defaults)
    if faults:  # what is left is checked beside the defaults
        fields, _ = _checked({k: v for k, v in given.items() if k not in faults}, defaults)
    config = Config(**{name: make(**fields[name]) for name, make in SECTIONS.items()})
    problems += [*clashes, *faults.values()]
    problems += [p for p in contradictions(config) if not any(key in p for key in faults)]
    if problems:
        raise ConfigError(listed(problems))
    return config


_KEYS = (*FIELD_OF_KEY, *ALIASES)


def listed(problems: Sequence[str]) -> str:
    """Return one problem as it is, or several as a numbered list of one line each."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join([f"the configuration has {len(problems)} problems:", *lines])


def _checked(
    given: Mapping[str, Scalar], defaults: Mapping[str, Scalar]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the fields of each section that are allowed, and what is wrong with each other key."""
    merged = settled(given, defaults)
    sections: dict[str, dict[str, Any]] = {}
    faults: dict[str, str] = {}
    for name, section in SECTIONS.items():
        hints = _hints(section)
        sections[name] = {}
        for field in dataclasses.fields(section):
            key = section.prefix + field.name.replace("_", "-")
            try:
                sections[name][field.name] = check_value(key, merged[key], hints[field.name])
            except ConfigError as error:
                faults[key] = str(error)
    return sections, faults


def settled(given: Mapping[str, Scalar], defaults: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return every key with its value: what was set, else its default where that applies."""
    changed = {reset.key: reset.value for reset in resets(given, defaults)}
    known = {key: value for key, value in defaults.items() if key not in ALIASES}
    return automatic.settle({**known, **given, **changed})


def unknown_key(key: str, value: Scalar) -> str:
    """Return what is wrong with an unknown key: the one that is meant, and what to write."""
    last, told = last_part(key), f"Unknown configuration key {key!r}."
    if last in NO_KEY:
        return f"{told} {NO_KEY[last]}"
    if last in PER_ROUND:
        count = value if type(value) is int and value > 0 else "N"
        return f"{told} Write --sites-per-round {count}, or set strategy.fraction-train."
    if why := refused_start(key, value):
        return why
    if table := table_meant(key):
        return f"{told} Write {table}={json.dumps(value)}."
    meant = key_meant(key, _KEYS)
    if not meant:
        return f"{told}{nearest(key, _KEYS)} {documented('configuration')} lists all keys."
    written = pasted(ALIASES.get(meant, meant), _value_meant(meant, value, key))
    if meant.endswith("num-train-epochs"):
        written = f"{written} and {MAX_STEPS}=-1" if written else ""
    asked = documented("configuration")
    advice = f"Write {written}." if written else f"{asked} says what it takes."
    return f"{told} Did you mean {meant!r}? {advice} {asked} lists all keys."


def pasted(key: str, value: Scalar) -> str:
    """Return `key=value` as TOML and `--set` read it; empty if the value is not allowed."""
    kinds, rules = _rules(key)
    typed = _in_type(value, kinds)
    if type(typed) not in kinds or not all(rule.admits(typed) for rule in rules):
        return ""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
    return f"{key}={text}"


def without_aliases(
    values: Mapping[str, Scalar], defaults: Mapping[str, Scalar]
) -> tuple[dict[str, Scalar], list[str]]:
    """Return values under their keys instead of aliases, and the aliases that contradict theirs.

    An alias overrides its key where that has its default: Flower hands over every key.
    """
    out = {key: value for key, value in values.items() if key not in ALIASES}
    clashes = []
    for alias, key in ALIASES.items():
        given = values.get(alias, "")
        if given == "":
            continue
        if out.get(key, defaults[key]) not in (defaults[key], given):
            clashes.append(
                f"{alias} = {given!r} and {key} = {out[key]!r} contradict each other: "
                f"the first is an alias of the second. Set {key} only."
            )
        out[key] = given
    return out, clashes


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Return `value` in the field's type, or raise `ConfigError`."""
    kinds, rules = _parts(hint)
    value = _in_type(value, kinds)
    if type(value) not in kinds:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        is_listed = any(isinstance(rule, OneOf) for rule in rules)
        allowed = str(rules[0]) if is_listed else names[kinds[0]]
        if any(isinstance(rule, Range) and rule.auto for rule in rules):
            allowed += f", or '{AUTO}'"
        raise ConfigError(
            f"{key} = {value!r} has the wrong type: it must be {allowed}.{_advice(key, value)}"
            f"{NOT_HONOURED.get(key, '')}"
        )
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{key} = {value!r} is not allowed: it has a NUL character.")
    for rule in rules:
        if not rule.admits(value):
            suggestion = _advice(key, value)
            if not suggestion and isinstance(value, str) and isinstance(rule, OneOf):
                suggestion = nearest(value, [str(v) for v in rule.values])
            reason = NOT_HONOURED.get(key, "")
            raise ConfigError(
                f"{key} = {value!r} is not allowed: it must be {rule}.{suggestion}{reason}"
            )
    return value


@cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def _parts(hint: Any) -> tuple[tuple[type, ...], list[Any]]:
    """Return the types of a field, and the rules that its values keep."""
    base, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    return typing.get_args(base) or (base,), rules


def _in_type(value: Any, kinds: tuple[type, ...]) -> Any:
    """Return an integer as a number where only a number is asked for."""
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf
    return value


def _advice(key: str, value: Scalar) -> str:
    """Return ` Write key=value.` for a value whose meaning is known, else an empty string."""
    meant = _value_meant(key, value) if key in FIELD_OF_KEY else value
    written = pasted(key, meant) if meant is not value else ""
    return f" Write {written}." if written else ""


def _value_meant(key: str, value: Scalar, name: str = "") -> Scalar:
    """Return what a value means for a key; one that is listed is found in any spelling."""
    rules = [rule for rule in _rules(key)[1] if isinstance(rule, OneOf)]
    for one in (one for rule in rules for one in rule.values):
        if isinstance(value, str) and only_letters(value) == only_letters(str(one)) != "":
            return one
    return value_meant(key, value, name)


def _rules(key: str) -> tuple[tuple[type, ...], list[Any]]:
    section, field = FIELD_OF_KEY[ALIASES.get(key, key)]
    return _parts(_hints(SECTIONS[section])[field])


MOST_COLUMNS = 5
"""Columns of subgroups of a run."""

NOT_HONOURED = {
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
    earlier, rounds = config.federation.earlier_schedules, config.federation.num_server_rounds
    if earlier and parts_of(earlier)[-1][0] >= rounds:
        yield (
            f"earlier-schedules = {earlier!r} leaves no round of num-server-rounds = {rounds}: "
            "raise that, or leave earlier-schedules empty."
        )
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
    if config.train.replay_examples > arguments.per_device_train_batch_size:
        yield (
            f"train.replay-examples = {config.train.replay_examples} exceeds "
            "train.training-arguments.per-device-train-batch-size = "
            f"{arguments.per_device_train_batch_size}: replay at most as many examples as a batch "
            "has."
        )
    if 0 < arguments.max_steps < arguments.warmup_steps:
        yield (
            f"train.training-arguments.warmup-steps = {arguments.warmup_steps} exceeds max-steps = "
            f"{arguments.max_steps}: warm-up would never end. Lower it, or raise max-steps."
        )
    if strategy.fraction_evaluate > 0 and data.held_out_fraction == 0:
        yield (
            f"strategy.fraction-evaluate = {strategy.fraction_evaluate:g} needs held-out examples: "
            "set data.held-out-fraction (0.05 is usual), or strategy.fraction-evaluate = 0."
        )
    columns = config.subgroup_columns
    if len(set(columns)) < len(columns) or len(columns) > MOST_COLUMNS:
        yield (
            f"data.subgroup-columns = {data.subgroup_columns!r} must be up to {MOST_COLUMNS} "
            "different columns, separated by commas."
        )
    if columns and config.is_private:
        yield (
            f"data.subgroup-columns = {data.subgroup_columns!r} does not go with "
            "privacy.unit-guarantee: losses by subgroup would be told without noise. Leave it out."
        )
    if data.partitioner in ("dirichlet", "natural") and not data.partition_by:
        yield f'data.partitioner = "{data.partitioner}" needs data.partition-by, a column name.'
    if data.prompt_template != "chat":
        for key, text in (
            ("data.template-date", data.template_date),
            ("data.template-options", data.template_options),
            ("data.system-prompt", "" if is_own(data.prompt_template) else data.system_prompt),
        ):
            if text:
                yield f'{key} = {text!r} has no effect without data.prompt-template = "chat".'
    data_set = config.static
    for name, words in (
        (config.model.name, {"model.revision": config.model.revision}),
        (
            data_set.name,
            {
                "static.dataset.config": data_set.config,
                "static.dataset.split": "" if data_set.split == TRAIN else data_set.split,
                "static.dataset.revision": data_set.revision,
            },
        ),
    ):
        for key, word in words.items():
            if word and (name in EMBEDDED_DATA or names_a_base(name) or found(name)):
                yield (
                    f"{key} = {word!r} is for the Hugging Face hub, and {name!r} is not there but "
                    "here: leave the key out."
                )
    for key, value, hint in (
        ("model.name", config.model.name, "a Hub name, a folder, or formulary"),
        (
            "static.dataset.name",
            config.static.name,
            f"a Hub name, a file, or {' or '.join(EMBEDDED_DATA)}",
        ),
        ("model.lora.target-modules", config.lora.target_modules, "module names, or auto"),
        ("data.answer-column", data.answer_column, "a column name"),
    ):
        if not value:
            yield f"{key} is empty: set {hint}."
    if 0 < config.defence.largest_norm < 1:
        yield (
            f"defence.largest-norm = {config.defence.largest_norm:g} would shorten every update of "
            "the median's norm: use at least 1 (3 is usual), or 0 for no such bound."
        )
    if 0 < config.defence.largest_spread < 1:
        yield (
            f"defence.largest-spread = {config.defence.largest_spread:g} is below the spread of "
            "updates that differ in no direction: use at least 1 (1.4 is the preset's), or 0 for "
            "no such screen."
        )
    for name, wanted in PRESETS.get(config.defence.preset, {}).items():
        if (has := config.flat()[name]) != wanted:
            yield (
                f"defence.preset = {config.defence.preset!r} sets {name} = {wanted:g}, but it is "
                f"set to {has}: leave one of the two out."
            )
    if 0 < strategy.largest_weight < 1:
        yield (
            f"strategy.largest-weight = {strategy.largest_weight:g} would limit every site to less "
            "than the median: use at least 1, or 0 for no limit."
        )
    if strategy.min_sites > sites:
        yield (
            f"strategy.min-sites = {strategy.min_sites} exceeds data.num-partitions = {sites}: "
            "lower it, or set 0 for all sites."
        )
    yield from _start_contradictions(config)
    yield from _rule_contradictions(config)
    yield from _pruning_contradictions(config)
    yield from _codec_contradictions(config)
    yield from privacy_contradictions(config)
    yield from masked_contradictions(config)
    yield from personal_contradictions(config)
    yield from preference_contradictions(config)


def idle_last_round(config: Config) -> str:
    """Return why the last round trains nothing; empty if it does.

    A warning in process and in simulation; real sites refuse it, since a visit at a rate of 0 would
    only measure losses.
    """
    if config.train.learning_rate_min > 0:
        return ""
    return (
        "train.learning-rate-min = 0 gives the last round a learning rate of 0, so that it trains "
        "nothing: set train.learning-rate-min above 0 (a tenth of train.learning-rate-max is "
        "usual)."
    )


def _start_contradictions(config: Config) -> Iterator[str]:
    """Yield settings that do not work with a run that goes on from a saved adapter.

    A site compares what it receives with the hash of that adapter, so it must receive all of it.
    """
    if not config.lora.is_continued:
        return
    key = "model.lora.from-adapter"
    if (codec := config.communication.downlink_codec) not in EXACT_CODECS:
        yield (
            f"communication.downlink-codec = {codec!r} changes the adapter of {key} on its way, so "
            f'that no site could compare it with its hash: set "none".'
        )
    if config.strategy.site_ranks:
        yield (
            f"strategy.site-ranks = {config.strategy.site_ranks!r} gives some sites a part of the "
            f"adapter of {key}, which none can compare with its hash: leave site-ranks empty."
        )


def _rule_contradictions(config: Config) -> Iterator[str]:
    """Yield settings that the aggregation rule cannot work with."""
    strategy, rank, cohort = config.strategy, config.lora.peft_lora_r, config.cohort_size
    name, needed = strategy.name, strategy.needed_replies
    ranks = words_of(strategy.site_ranks)
    mixed = [rule for rule, requires in STRATEGIES.items() if requires.mixed_ranks]
    allowed = " or ".join(f'"{rule}"' for rule in mixed)
    if ranks and name not in mixed:
        yield (
            f"strategy.site-ranks needs strategy.name = {allowed}: {name} averages tensors of "
            "equal shape. Change the rule, or leave site-ranks empty."
        )
    if not all(r.isascii() and r.isdigit() and 1 <= int(r) <= rank for r in ranks):
        yield (
            f"strategy.site-ranks = {strategy.site_ranks!r} is not allowed: it must be integers "
            f"from 1 to model.lora.peft-lora-r = {rank}, comma-separated."
        )
    if config.lora.peft_use_dora and not STRATEGIES[name].averages_tensors:
        recomputes = not STRATEGIES[name].error_feedback
        why = (
            "it recomputes A and B from the sites' products, and DoRA's weights follow from "
            "magnitudes too, which no product holds"
            if recomputes
            else "it freezes a factor so that the mean of the products B A is exact, which DoRA's "
            "division by a norm undoes"
        )
        able = ", ".join(rule for rule, asks in STRATEGIES.items() if asks.averages_tensors)
        yield (
            f"model.lora.peft-use-dora = true does not go with strategy.name = {name!r}: {why}. "
            f"Set one of {able}, or model.lora.peft-use-dora = false."
        )
    if config.lora.rank_pattern and (ranks or STRATEGIES[name].stacks):
        why, instead = (
            ("strategy.site-ranks gives one rank to all modules of a site", "leave one of them out")
            if ranks
            else (
                f"{name} stacks the adapters of all modules to one rank, strategy.max-rank",
                "use another rule (fedavg, fedprox, product)",
            )
        )
        yield (
            f"model.lora.rank-pattern = {config.lora.rank_pattern!r} cannot be combined with it: "
            f"{why}. Leave the pattern out, or {instead}."
        )
    if ranks and config.defence.screens:
        key, value, off = "min-cosine", config.defence.min_cosine, -1
        if value == off:
            key, value, off = "largest-spread", config.defence.largest_spread, 0
        yield (
            f"defence.{key} = {value:g} cannot compare updates of different ranks: set it to "
            f"{off}, or leave strategy.site-ranks empty."
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
    if strategy.outer_nesterov and not STRATEGIES[name].outer:
        able = ", ".join(rule for rule, asks in STRATEGIES.items() if asks.outer)
        yield (
            f"strategy.outer-nesterov = true does not go with strategy.name = {name!r}, whose step "
            f"is not the mean of the updates: set one of {able}, or outer-nesterov = false."
        )
    if STRATEGIES[name].in_turn and config.arguments.max_steps == 1:
        yield (
            f"train.training-arguments.max-steps = 1 would train B alone under {name}, which "
            "trains B and A in turn by step: use at least 2."
        )
    if STRATEGIES[name].by_norm:
        yield from _idle_weights(config)
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


def _idle_weights(config: Config) -> Iterator[str]:
    """Yield what is set in vain under a rule that weighs updates by norms.

    `largest-weight` has a limit by default, which has no effect there.
    """
    strategy, preset = config.strategy, config.defence.preset
    for key, value, is_set, off in (
        ("strategy.weighting", strategy.weighting, strategy.weighting == "equal", '"examples"'),
        (
            "defence.preset",
            preset,
            "strategy.largest-weight" in PRESETS.get(preset, {}),
            '"none" and defence.largest-norm, which bounds an update',
        ),
    ):
        if is_set:
            yield (
                f"{key} = {value!r} does not go with strategy.name = {strategy.name!r}, which "
                "weighs updates by the norms of the sites' models, so that strategy.largest-weight "
                f"limits none. Set {off}, or another rule."
            )


def _pruning_contradictions(config: Config) -> Iterator[str]:
    """Yield settings that do not go with sites that prune their ranks."""
    if not config.strategy.prunes:
        return
    how, lora, screens = config.personalisation, config.lora, config.defence
    for key, value, is_met, why, instead in (
        (
            "model.lora.rank-pattern",
            repr(lora.rank_pattern),
            bool(lora.rank_pattern),
            "a site prunes to one rank for all modules",
            "leave it out",
        ),
        (
            "model.lora.from-adapter",
            repr(lora.from_adapter or lora.from_adapter_sha256),
            lora.is_continued,
            "a site that pruned could not compare its part with the saved adapter's hash",
            "leave it out",
        ),
        (
            "defence.min-cosine",
            f"{screens.min_cosine:g}",
            screens.min_cosine > -1,
            "updates of different ranks cannot be compared",
            "set -1",
        ),
        (
            "defence.largest-spread",
            f"{screens.largest_spread:g}",
            screens.largest_spread > 0,
            "updates of different ranks cannot be compared",
            "set 0",
        ),
        (
            "personalisation.name",
            repr(how.name),
            config.is_personal,
            "a site's own adapter has the run's rank",
            'set "none"',
        ),
    ):
        if is_met:
            yield (
                f"{key} = {value} does not go with strategy.rank-decay = "
                f"{config.strategy.rank_decay:g}: {why}. {instead[0].upper()}{instead[1:]}, or "
                "rank-decay = 1."
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
