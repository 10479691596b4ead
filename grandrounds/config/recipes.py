"""Where a configuration comes from: packaged defaults, recipe files, FlowerTune entries."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grandrounds.config.keys import FIELD_OF_KEY, PLACES, Config
from grandrounds.config.validation import parse
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError

LEADERBOARD_DATA = (
    "medalpaca/medical_meadow_medical_flashcards",
    "flwrlabs/medical-meadow-medical-flashcards",
)
"""The two hub names of the medical leaderboard's training data."""

LEADERBOARD_PARTITIONS = 20

FLOWERTUNE_TEMPLATE: dict[str, Scalar] = {
    "strategy.name": "fedavg",
    "strategy.proximal-mu": 0.0,
    "strategy.cohorts": "uniform",
    "strategy.fraction-evaluate": 0.0,
    "model.lora.dropout": 0.075,
    "data.held-out-fraction": 0.0,
}
"""What the FlowerTune template fixes in its code, for the keys that its pyproject leaves out."""

FOREIGN_KEYS: dict[str, tuple[Scalar, str]] = {
    "task.name": ("medical", "only the medical task is served"),
}
"""Keys of single published entries: the value that means what happens here anyway, and why not
another."""


def defaults() -> dict[str, Scalar]:
    """Return the packaged defaults, flat: `[tool.flwr.app.config]` of this project's pyproject."""
    here = Path(__file__).resolve().parent.parent  # the package's own folder
    for path in (here / "pyproject.toml", here.parent / "pyproject.toml"):
        if path.is_file():
            table = tomllib.loads(path.read_text())
            if table.get("project", {}).get("name") == "grandrounds":
                return flatten(table["tool"]["flwr"]["app"]["config"])
    raise ConfigError(
        f"The defaults are missing: no pyproject.toml of grandrounds beside {here}. "
        "Install the package again."
    )


def load_recipe(path: Path) -> dict[str, Scalar]:
    """Read a recipe file, or the pyproject.toml of a FlowerTune entry, as a flat mapping.

    A FlowerTune entry is known by its `[tool.flwr.app.config]`. What its template fixes in code is
    filled in from `FLOWERTUNE_TEMPLATE`, and the number of sites from its federation's
    `options.num-supernodes`.

    Raises
    ------
    ConfigError
        If the file is missing, is not TOML, or has a key of one entry's own that cannot be
        honoured.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
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
    """Return the table at a path of names, empty if it is not there."""
    for i, name in enumerate(names):
        table = table.get(name, {})
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{'.'.join(names[: i + 1])} = {table!r} must be a table in a Flower app's "
                "pyproject.toml."
            )
    return table


def from_flowertune(entry: dict[str, Scalar], num_supernodes: Any) -> dict[str, Scalar]:
    """Return a FlowerTune entry's configuration in this project's keys.

    Parameters
    ----------
    num_supernodes
        The number of sites in the entry's default federation; None if it names none.
    """
    for key, (same_thing, why) in FOREIGN_KEYS.items():
        if key in entry and entry.pop(key) != same_thing:
            raise ConfigError(f"{key} cannot be honoured: {why}. Remove it, or set {same_thing!r}.")
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
                f"{key} = {value!r} is a {type(value).__name__}; Flower's run config takes texts, "
                'numbers and true/false only. Write a list as one text: "q_proj,v_proj".'
            )
    return flat


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Return a flat configuration as TOML with quoted keys; Flower and `load_recipe` read it."""

    def literal(value: Scalar) -> str:
        if isinstance(value, str):  # JSON's texts are TOML's, but for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(f"{literal(key)} = {literal(value)}\n" for key, value in flat.items())


def parse_overrides(assignments: Iterable[str]) -> dict[str, Scalar]:
    """Read `KEY=VALUE` texts; a value that is no TOML value is taken as a plain text.

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
                f"{assignment!r} is not an override: write KEY=VALUE, for example "
                "num-server-rounds=10."
            )
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        out |= flatten({key.strip(): value})
    return out


def from_options(
    file: Path | None, assignments: Iterable[str] | None, **options: Scalar | None
) -> dict[str, Scalar]:
    """Return what a command was given: a recipe, overrides over it, and options over both.

    Parameters
    ----------
    options
        model, data, rounds, seed, run_directory; None where not given.
    """
    settings = load_recipe(file) if file else {}
    settings |= parse_overrides(assignments or [])
    given = {OPTIONS[name]: value for name, value in options.items() if value is not None}
    return settings | given


OPTIONS = {
    "model": "model.name",
    "data": "static.dataset.name",
    "rounds": "num-server-rounds",
    "seed": "seed",
    "run_directory": "run-directory",
}
"""Option of a command → the key that it sets."""


def resolve(*layers: Mapping[str, Scalar]) -> Config:
    """Merge layers over the packaged defaults, later ones winning, and check the whole."""
    base = defaults()
    merged: dict[str, Scalar] = {}
    for layer in layers:
        merged |= layer
    return parse(merged, base)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with local files in full, so that it means the same everywhere."""

    def full(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if name != "formulary" and path.exists() else name

    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=full(config.model.name)),
        static=dataclasses.replace(config.static, name=full(config.static.name)),
    )


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old → new` for every key that differs, run directories and trackers apart."""
    ignored = (*PLACES, "train.report-to")
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {before[key]!r} → {after[key]!r}"
        for key in FIELD_OF_KEY
        if key not in ignored and before[key] != after[key]
    ]


def leaderboard_differences(config: Config) -> list[str]:
    """Return why a run does not compare with FlowerTune's medical leaderboard; empty if it does."""
    reasons = []
    if config.static.name not in LEADERBOARD_DATA:
        reasons.append(f"static.dataset.name is {config.static.name}")
    if config.data.num_partitions != LEADERBOARD_PARTITIONS:
        reasons.append(f"{config.data.num_partitions} partitions, not {LEADERBOARD_PARTITIONS}")
    if config.data.partitioner != "iid":
        reasons.append(f"partitioner {config.data.partitioner}, not iid")
    if config.data.held_out_fraction:
        reasons.append(f"{config.data.held_out_fraction:.0%} of each site's data held out")
    columns = (config.data.question_column, config.data.answer_column)
    if columns != ("input", "output"):
        reasons.append(f"columns {' and '.join(columns)}, not input and output")
    return reasons
