"""FlowerTune entries: what the pyproject.toml of a published entry means here.

An entry leaves to its template what it does not say. The packaged defaults belong to the embedded
base and take no part: a missing base or data set is an error, every other missing key has the
template's value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grandrounds.config.keys import TABLES, share_of
from grandrounds.config.starts import wanted_start
from grandrounds.config.synonyms import last_part, spelled_here
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError

_ARGUMENTS = "train.training-arguments."

IN_CODE: dict[str, Scalar] = {
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "strategy.cohorts": "uniform",
    "strategy.fraction-evaluate": 0.0,
    "strategy.largest-weight": 0.0,
    "defence.largest-norm": 0.0,
    "model.lora.dropout": 0.075,
    "data.held-out-fraction": 0.0,
    "data.partitioner": "iid",
    "train.replay-examples": 0,
}
"""What the template hard-codes, for keys that its pyproject.toml does not have."""

IN_ITS_FILE: dict[str, Scalar] = {
    "model.quantization": 4,
    "model.gradient-checkpointing": True,
    "model.lora.peft-lora-r": 32,
    "model.lora.peft-lora-alpha": 64,
    "train.save-every-round": 5,
    "train.learning-rate-max": 5e-5,
    "train.learning-rate-min": 1e-6,
    "train.seq-length": 512,
    f"{_ARGUMENTS}per-device-train-batch-size": 16,
    f"{_ARGUMENTS}gradient-accumulation-steps": 1,
    f"{_ARGUMENTS}num-train-epochs": 3,
    f"{_ARGUMENTS}max-steps": 10,
    "strategy.fraction-train": 0.1,
    "num-server-rounds": 200,
    "data.num-partitions": 20,
}
"""What the template's pyproject.toml sets, for keys that an entry leaves out. Source:
https://github.com/adap/flower/tree/11277f47a17c03ebee67083995f4feac5dc9a989 (framework/py/flwr/cli/
new/templates/app/pyproject.flowertune.toml.tpl)."""

ENTRY_SECTIONS = ("model.", "train.", "static.")
"""Sections of which an entry has a key; another Flower app has none."""

REQUIRED = ("model.name", "static.dataset.name")
"""Keys without which an entry does not say what it trains."""

ONLY: dict[str, tuple[Scalar, str]] = {
    "task.name": (
        "medical",
        "only the medical task is supported. To train on another task's data, remove the key and "
        "name their columns, for example --set data.question-column=instruction,input",
    ),
    "train.objective": (
        "sft",
        "a FlowerTune entry is tuned on answers, one to each question. To train on preferences, "
        "write a recipe: docs/preferences.md",
    ),
}
"""Keys of individual published entries: the one value supported here, and why no other."""

FLEXLORA = ("strategy.use-flexlora", "use-flexlora")

FLEXLORA_RULES = ("product", "flexlora")
"""Names of its aggregation rule; of the second, an error says that it is called by the first."""

SWITCHES = {
    **dict.fromkeys(("true", "on", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "off", "no", "none", "0", "0.0", ""), False),
}
"""What an entry writes for yes and no."""

_TARGETS = "model.lora.target-modules"

OTHER_NAMES = {
    **dict.fromkeys(
        (
            "model.lora.peft-lora-target-modules",
            "model.lora.peft-target-modules",
            "model.lora.lora-target-modules",
            "model.lora.modules",
        ),
        _TARGETS,
    ),
    **dict.fromkeys(
        ("model.lora.peft-lora-dropout", "model.lora.peft-dropout", "model.lora.lora-dropout"),
        "model.lora.dropout",
    ),
    **{
        f"model.lora.{before}{name}": f"model.lora.{name}"
        for before in ("peft-lora-", "peft-", "lora-")
        for name in ("rank-pattern", "alpha-pattern", "use-rslora")
    },
}
"""Names that entries gave to keys of their own code."""

_TRACKER = "a run logs to a tracker only if its user asks for it: --set train.report-to=wandb"
_ATTENTION = "attention runs on PyTorch's own kernels, FlashAttention among them"

NOT_USED = {
    **dict.fromkeys(("report-to", "use-wandb", "wandb-project", "wandb-entity"), _TRACKER),
    **dict.fromkeys(("run-name", "wandb-run-name"), "a run is named by its directory: --run-dir"),
    **dict.fromkeys(
        ("attn", "attn-implementation", "use-flash-attention", "flash-attention"), _ATTENTION
    ),
}
"""Last part of an entry's key that changes nothing computed → what holds instead."""

CHECKPOINTING = ("model.gradient-checkpointing", f"{_ARGUMENTS}gradient-checkpointing")

LEAST_COHORT = 2
"""Sites that Flower's FedAvg trains in a round at least (`min_train_nodes`)."""


@dataclass
class Entry:
    """A FlowerTune entry under our keys."""

    values: dict[str, Scalar]
    """The configuration; a required key that the entry leaves out is empty."""
    filled: dict[str, Scalar] = field(default_factory=dict)
    """Keys that the entry leaves out, with the template's values."""
    said: list[str] = field(default_factory=list)
    """What else a reader should know, one sentence each."""

    def notes(self, settings: Mapping[str, Scalar]) -> list[str]:
        """Return what a reader should know of a run of this entry with these settings."""
        said = [*self.said, *_small_cohort(settings)]
        kept = [f"{k} = {_toml(v)}" for k, v in self.filled.items() if settings.get(k) == v]
        if not kept:
            return said
        told = "the entry does not say, so the FlowerTune template's values are used"
        return [f"{told}: {', '.join(kept)}.", *said]


def read_entry(
    written: Mapping[str, Scalar], num_supernodes: Any, keys: Collection[str], held_out: Scalar
) -> Entry:
    """Return an entry's configuration under our keys.

    Parameters
    ----------
    written
        Its `[tool.flwr.app.config]`, flat.
    num_supernodes
        Number of sites in the entry's default federation; None if not given.
    keys
        All keys and aliases.
    held_out
        Held-out share of an entry that evaluates without naming one.

    Raises
    ------
    ConfigError
        If two spellings of a key contradict each other, or a key cannot be honoured.
    """
    entry = _spelled(written, keys)
    for key, (same_thing, why) in ONLY.items():
        value = entry.pop(key, same_thing)
        if value != same_thing:
            raise ConfigError(f"{key} = {value!r} cannot be honoured: {why}.")
    flexlora = _flexlora(entry)
    if _TARGETS in entry:
        entry[_TARGETS] = _targets(str(entry[_TARGETS]))
    said = [*_not_used(entry, keys), *_of_unsloth(entry)]
    found = Entry({**IN_CODE, **flexlora, **entry})
    if num_supernodes is not None:
        found.values.setdefault("data.num-partitions", num_supernodes)
    found.filled = _left_out(found.values)
    found.values |= dict.fromkeys(REQUIRED, "") | found.filled | found.values
    found.said = [*_unsaid(found.values), *_without_effect(found.values), *said]
    evaluated = found.values["strategy.fraction-evaluate"]
    if evaluated not in (0, "") and "data.held-out-fraction" not in entry:
        found.values["data.held-out-fraction"] = held_out
    return found


def _spelled(written: Mapping[str, Scalar], keys: Collection[str]) -> dict[str, Scalar]:
    """Return an entry's keys in our spelling: the template reads `-` and `_` alike."""
    out: dict[str, Scalar] = {}
    spelling: dict[str, str] = {}
    known = {*keys, *ONLY, *FLEXLORA}
    for given, value in written.items():
        ours = OTHER_NAMES.get(spelled_here(given), spelled_here(given))
        key = given if given in known or ours not in known else ours
        key = _of_table(given) or key
        if key in out and out[key] != value:
            raise ConfigError(
                f"{spelling[key]} = {out[key]!r} and {given} = {value!r} are the same key and "
                "contradict each other. Keep one of them."
            )
        out[key], spelling[key] = value, given
    return out


def _of_table(given: str) -> str:
    """Return a key of a table under the table's name here; empty for any other key."""
    for name, key in (*((table, table) for table in TABLES), *OTHER_NAMES.items()):
        if key in TABLES and spelled_here(given[: len(name)]) == name and given[len(name) :]:
            return f"{key}{given[len(name) :]}"
    return ""


def _flexlora(entry: dict[str, Scalar]) -> dict[str, Scalar]:
    """Drop the keys that ask for FlexLoRA; return the rule that they ask for.

    Raises
    ------
    ConfigError
        If they contradict each other or `strategy.name`.
    """
    given = {key: entry.pop(key) for key in FLEXLORA if key in entry}
    asked = {key: _is_on(key, value) for key, value in given.items()}
    if not asked:
        return {}
    rule = entry.get("strategy.name")
    is_on = rule in FLEXLORA_RULES
    if len({*asked.values(), *([is_on] if rule is not None else [])}) > 1:
        named = given if rule is None else given | {"strategy.name": rule}
        each = " and ".join(f"{key} = {value!r}" for key, value in named.items())
        raise ConfigError(
            f'{each} contradict each other: FlexLoRA is strategy.name = "product". Keep one of '
            "them."
        )
    return {"strategy.name": "product"} if any(asked.values()) else {}


def _is_on(key: str, value: Scalar) -> bool:
    """Return a switch of an entry; raise `ConfigError` if it is none."""
    written = str(value).strip().lower()
    if written in SWITCHES:
        return SWITCHES[written]
    raise ConfigError(f"{key} = {value!r} must be true or false.")


def _left_out(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the template's values of the keys that an entry leaves out."""
    aliases = {"strategy.fraction-train": "strategy.fraction-fit"}
    missing = {
        key: value
        for key, value in IN_ITS_FILE.items()
        if key not in values and aliases.get(key, "") not in values
    }
    checkpointing = f"{_ARGUMENTS}gradient-checkpointing"
    if "model.gradient-checkpointing" in missing and checkpointing in values:
        missing["model.gradient-checkpointing"] = values[checkpointing]
    return missing


def _unsaid(values: Mapping[str, Scalar]) -> Iterator[str]:
    """Yield a sentence on formats that the template leaves to its libraries."""
    unsaid = [key for key in ("bf16", "tf32") if f"{_ARGUMENTS}{key}" not in values]
    if unsaid:
        what, they, them = (
            (unsaid[0], "it is used", "it")
            if len(unsaid) == 1
            else ("bf16 and tf32", "they are used", "them")
        )
        yield (
            f"the entry does not set {what}: {they} where the hardware has {them} (the template's "
            f"libraries leave {them} off)."
        )


def _without_effect(values: dict[str, Scalar]) -> Iterator[str]:
    """Drop the warm-up of a constant schedule, as Hugging Face's `constant` does."""
    schedule, warmup = f"{_ARGUMENTS}lr-scheduler-type", f"{_ARGUMENTS}warmup-steps"
    if values.get(schedule) == "constant" and values.get(warmup, 0) != 0:
        yield (
            f"{warmup} = {values[warmup]} has no effect with lr-scheduler-type = 'constant', as in "
            "Hugging Face's schedule: there is no warm-up."
        )
        values[warmup] = 0


def _targets(written: str) -> Scalar:
    """Return target modules as PEFT takes them: of several names, those that match are adapted."""
    if written.strip().lower().replace("_", "-") in ("all", "all-linear"):
        return "all-linear"
    names = re.findall(r"[\w.-]+", written)
    return ",".join(f"{name}?" for name in names) if len(names) > 1 else written


def _not_used(entry: dict[str, Scalar], keys: Collection[str]) -> Iterator[str]:
    """Drop keys that change nothing computed; yield what holds instead of those that are on.

    The start of every run, asked for by name, is one of them.
    """
    for key in [key for key in entry if wanted_start(key, entry[key]) == "true"]:
        del entry[key]
    for key in [key for key in entry if key not in keys and last_part(key) in NOT_USED]:
        value = entry.pop(key)
        if str(value).strip().lower() not in ("", "false", "off", "no", "none", "0"):
            yield f"{key} = {_toml(value)} is not used: {NOT_USED[last_part(key)]}."


def _of_unsloth(entry: dict[str, Scalar]) -> Iterator[str]:
    """Replace Unsloth's checkpointing, which also moves activations to main memory."""
    given = [key for key in CHECKPOINTING if entry.get(key) == "unsloth"]
    entry.update(dict.fromkeys(given, True))
    if given:
        yield (
            f"{given[0]} = 'unsloth' is read as true: activations are recomputed, and not moved to "
            "main memory; the gradients are the same."
        )


def _small_cohort(settings: Mapping[str, Scalar]) -> Iterator[str]:
    """Yield what happens where a fraction selects fewer sites than Flower's FedAvg does."""
    sites = settings.get("data.num-partitions")
    fraction = settings.get("strategy.fraction-train", settings.get("strategy.fraction-fit"))
    if type(sites) is not int or not isinstance(fraction, int | float) or sites < LEAST_COHORT:
        return
    if 0 < fraction <= 1 and (cohort := share_of(fraction, sites)) < LEAST_COHORT:
        yield (
            f"a fraction of {fraction:g} of {sites} sites is {cohort} site a round; Flower's "
            f"FedAvg would train {LEAST_COHORT}. For its cohort, give --sites-per-round "
            f"{LEAST_COHORT}."
        )


def _toml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
