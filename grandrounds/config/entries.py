"""FlowerTune entries: what the pyproject.toml of a published entry means here.

An entry leaves to its template what it does not say. The packaged defaults belong to the embedded
base and take no part: a missing base or data set is an error, every other missing key has the
template's value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grandrounds.config.synonyms import spelled_here
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

REQUIRED = ("model.name", "static.dataset.name")
"""Keys without which an entry does not say what it trains."""

ONLY: dict[str, tuple[Scalar, str]] = {
    "task.name": ("medical", "only the medical task is supported"),
}
"""Keys of individual published entries: the one value supported here, and why no other."""

FLEXLORA = ("strategy.use-flexlora", "use-flexlora")

OTHER_NAMES = {
    "model.lora.peft-lora-target-modules": "model.lora.target-modules",
    "model.lora.peft-target-modules": "model.lora.target-modules",
    "model.lora.peft-lora-dropout": "model.lora.dropout",
}
"""Names that entries gave to keys of their own code."""


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
        kept = [f"{k} = {_toml(v)}" for k, v in self.filled.items() if settings.get(k) == v]
        if not kept:
            return self.said
        told = "the entry does not say, so the FlowerTune template's values are used"
        return [f"{told}: {', '.join(kept)}.", *self.said]


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
        if key in entry and entry.pop(key) != same_thing:
            raise ConfigError(f"{key} cannot be honoured: {why}. Remove it or set {same_thing!r}.")
    asked = [_is_on(entry.pop(key)) for key in FLEXLORA if key in entry]
    flexlora: dict[str, Scalar] = {"strategy.name": "product"} if any(asked) else {}
    targets = "model.lora.target-modules"
    if entry.get(targets) == "all":
        entry[targets] = "all-linear"
    found = Entry({**IN_CODE, **flexlora, **entry})
    if num_supernodes is not None:
        found.values.setdefault("data.num-partitions", num_supernodes)
    found.filled = _left_out(found.values)
    found.values |= dict.fromkeys(REQUIRED, "") | found.filled | found.values
    found.said = [*_unsaid(found.values), *_without_effect(found.values)]
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
        if key in out and out[key] != value:
            raise ConfigError(
                f"{spelling[key]} = {out[key]!r} and {given} = {value!r} are the same key and "
                "contradict each other. Keep one of them."
            )
        out[key], spelling[key] = value, given
    return out


def _is_on(value: Scalar) -> bool:
    return str(value).strip().lower() in ("true", "on", "yes", "1")


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


def _toml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
