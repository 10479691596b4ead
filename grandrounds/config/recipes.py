"""Sources of a configuration: packaged defaults, recipe files, FlowerTune entries."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from grandrounds.config.bases import names_a_base
from grandrounds.config.keys import FIELD_OF_KEY, PLACES, Config
from grandrounds.config.resets import resets
from grandrounds.config.validation import parse, settled, without_aliases
from grandrounds.config.values import Scalar
from grandrounds.config.words import counted, percent, place_name
from grandrounds.errors import ConfigError
from grandrounds.storage import found, read_toml

LEADERBOARD_DATA = (
    "medalpaca/medical_meadow_medical_flashcards",
    "flwrlabs/medical-meadow-medical-flashcards",
)
"""Hub names of the medical leaderboard's training data."""

LEADERBOARD_PARTITIONS = 20

FLOWERTUNE_TEMPLATE: dict[str, Scalar] = {
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "strategy.cohorts": "uniform",
    "strategy.fraction-evaluate": 0.0,
    "model.lora.dropout": 0.075,
    "data.held-out-fraction": 0.0,
    "data.partitioner": "iid",
}
"""What the FlowerTune template hard-codes, for keys that its pyproject.toml does not have."""

FOREIGN_KEYS: dict[str, tuple[Scalar, str]] = {
    "task.name": ("medical", "only the medical task is supported"),
}
"""Keys of individual published entries: the one value supported here, and why no other."""


def defaults() -> dict[str, Scalar]:
    """Return the packaged defaults, flat: `[tool.flwr.app.config]` of our pyproject.toml."""
    return dict(_defaults())


@cache
def _defaults() -> dict[str, Scalar]:
    here = Path(__file__).resolve().parent.parent  # the package's own folder
    for path in (here / "pyproject.toml", here.parent / "pyproject.toml"):
        if path.is_file():
            table = read_toml(path)
            if table.get("project", {}).get("name") == "grandrounds":
                return flatten(table["tool"]["flwr"]["app"]["config"])
    raise ConfigError(
        f"The defaults are missing: no pyproject.toml of grandrounds in or beside {here}. "
        "Reinstall the package."
    )


def load_recipe(path: Path) -> dict[str, Scalar]:
    """Read a recipe, or the pyproject.toml of a FlowerTune entry, as a flat mapping.

    A FlowerTune entry is recognised by its `[tool.flwr.app.config]`. `FLOWERTUNE_TEMPLATE` supplies
    what its template hard-codes, and its federation's `options.num-supernodes` the number of sites.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, or has an entry-specific key that cannot be honoured.
    """
    table = read_toml(path)
    app = table_at(table, "tool", "flwr", "app")
    if "config" not in app:
        return flatten(table)
    entry = flatten(table_at(app, "config"))
    if table_at(table, "project").get("name") == "grandrounds":
        return entry
    federations = table_at(table, "tool", "flwr", "federations")
    federation = table_at(federations, str(federations.get("default", "")))
    return from_flowertune(entry, table_at(federation, "options").get("num-supernodes"))


def table_at(table: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the table at a path of names; empty if missing."""
    for i, name in enumerate(names):
        table = table.get(name, {})
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{'.'.join(names[: i + 1])} = {table!r} must be a table in a Flower app's "
                "pyproject.toml."
            )
    return table


def from_flowertune(entry: dict[str, Scalar], num_supernodes: Any) -> dict[str, Scalar]:
    """Return a FlowerTune entry's configuration under our keys.

    Parameters
    ----------
    num_supernodes
        Number of sites in the entry's default federation; None if not given.
    """
    for key, (same_thing, why) in FOREIGN_KEYS.items():
        if key in entry and entry.pop(key) != same_thing:
            raise ConfigError(f"{key} cannot be honoured: {why}. Remove it or set {same_thing!r}.")
    flexlora = {"strategy.name": "product"} if entry.pop("strategy.use-flexlora", False) else {}
    out = {**FLOWERTUNE_TEMPLATE, **flexlora, **entry}
    evaluated = out["strategy.fraction-evaluate"]
    if evaluated not in (0, "") and "data.held-out-fraction" not in entry:
        out["data.held-out-fraction"] = defaults()["data.held-out-fraction"]
    if num_supernodes is not None:
        out.setdefault("data.num-partitions", num_supernodes)
    return out


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return nested TOML tables as one mapping with dotted keys."""
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, bool | int | float | str):
            flat[key] = value
        else:
            raise ConfigError(
                f"{key} = {value!r} is a {type(value).__name__}; Flower's run config only takes "
                'strings, numbers and booleans. Write a list as one string: "q_proj,v_proj".'
            )
    return flat


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Return a flat configuration as TOML with quoted keys, as Flower and `load_recipe` read it."""

    def literal(value: Scalar) -> str:
        if isinstance(value, str):  # a JSON string is a TOML string, except for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(f"{literal(key)} = {literal(value)}\n" for key, value in flat.items())


def parse_overrides(assignments: Iterable[str]) -> dict[str, Scalar]:
    """Parse `KEY=VALUE` assignments; a value that is not TOML is taken as a string.

    Raises
    ------
    ConfigError
        If an assignment has no `=`.
    """
    out: dict[str, Scalar] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"{assignment!r} is not an override: use KEY=VALUE, for example "
                "num-server-rounds=10."
            )
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        out |= flatten({key.strip(): value})
    return out


Layer = tuple[str, Mapping[str, Scalar]]
"""Where values come from, and the values."""


def layers_of(
    file: Path | None, assignments: Iterable[str] | None, **options: Scalar | None
) -> list[Layer]:
    """Return a command's settings by their source; a later one overrides those before it.

    Parameters
    ----------
    options
        Values for the names in `OPTIONS`; None if not given.
    """
    layers: list[Layer] = [(f"recipe {file}", load_recipe(file))] if file else []
    if assignments:
        layers.append(("--set", parse_overrides(assignments)))
    for name, value in options.items():
        if value is not None:
            layers.append((f"--{name.replace('_', '-')}", {OPTIONS[name]: value}))
    return layers


def merged(layers: Iterable[Layer]) -> dict[str, Scalar]:
    """Return the settings of all layers as one mapping."""
    return {key: value for _, values in layers for key, value in values.items()}


def from_options(
    file: Path | None, assignments: Iterable[str] | None, **options: Scalar | None
) -> dict[str, Scalar]:
    """Return a command's settings: options override assignments, which override the recipe."""
    return merged(layers_of(file, assignments, **options))


OPTIONS = {
    "model": "model.name",
    "data": "static.dataset.name",
    "rounds": "num-server-rounds",
    "sites": "data.num-partitions",
    "seed": "seed",
    "run_dir": "run-directory",
}
"""Option of a command → key."""


def complete(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return every key with its value, unchecked: what was set, else its default if it applies."""
    default = defaults()
    return settled(without_aliases(values, default)[0], default)


def notes(values: Mapping[str, Scalar]) -> list[str]:
    """Return which defaults do not apply beside the values that were set, one sentence each."""
    default = defaults()
    return [str(reset) for reset in resets(without_aliases(values, default)[0], default)]


def resolve(*layers: Mapping[str, Scalar]) -> Config:
    """Merge layers over the packaged defaults, later ones overriding, and validate the result."""
    merged = {key: value for layer in layers for key, value in layer.items()}
    return parse(merged, defaults())


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute local paths, valid from any working directory."""

    def full(name: str) -> str:
        path = found(name) if name != "formulary" else None
        return str(path.absolute()) if path else name

    base = config.model.name
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=base if names_a_base(base) else full(base)),
        static=dataclasses.replace(config.static, name=full(config.static.name)),
    )


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old → new` for each difference, except run directories and trackers."""
    ignored = (*PLACES, "train.report-to")
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {before[key]!r} → {after[key]!r}"
        for key in FIELD_OF_KEY
        if key not in ignored and before[key] != after[key]
    ]


def leaderboard_differences(config: Config) -> list[str]:
    """Return why a run is not comparable with FlowerTune's medical leaderboard; empty if it is."""
    reasons = []
    if config.static.name not in LEADERBOARD_DATA:
        reasons.append(f"static.dataset.name is {place_name(config.static.name)}")
    if config.data.num_partitions != LEADERBOARD_PARTITIONS:
        count = counted(config.data.num_partitions, "partition")
        reasons.append(f"{count}, not {LEADERBOARD_PARTITIONS}")
    if config.data.partitioner != "iid":
        reasons.append(f"partitioner {config.data.partitioner}, not iid")
    if config.data.held_out_fraction:
        share = percent(config.data.held_out_fraction, 0)
        reasons.append(f"{share} of each site's data held out")
    columns = (config.data.question_column, config.data.answer_column)
    if columns != ("input", "output"):
        reasons.append(f"columns {' and '.join(columns)}, not input and output")
    return reasons
