"""Sources of a configuration: packaged defaults, recipe files, FlowerTune entries."""

from __future__ import annotations

import dataclasses
import datetime
import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from grandrounds.config.automatic import EMBEDDED_DATA
from grandrounds.config.bases import names_a_base
from grandrounds.config.entries import ENTRY_SECTIONS, Entry, read_entry
from grandrounds.config.keys import (
    ALIASES,
    DAYS,
    FIELD_OF_KEY,
    PATTERNS,
    PLACES_AND_TRACKERS,
    TABLES,
    TRAIN,
    Config,
    table_of,
)
from grandrounds.config.prompt import with_text
from grandrounds.config.resets import resets
from grandrounds.config.validation import parse, settled, without_aliases
from grandrounds.config.values import Scalar
from grandrounds.config.words import counted, is_utf8, percent, place_name
from grandrounds.errors import ConfigError
from grandrounds.storage import found, read_toml

LEADERBOARD_DATA = (
    "medalpaca/medical_meadow_medical_flashcards",
    "flwrlabs/medical-meadow-medical-flashcards",
)
"""Hub names of the medical leaderboard's training data."""

LEADERBOARD_PARTITIONS = 20


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

    A FlowerTune entry is recognised by its `[tool.flwr.app.config]`; see `config.entries`.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, is the pyproject.toml of something else, or has an
        entry-specific key that cannot be honoured; or if a prompt template that it names cannot be
        read.
    """
    found = _read(path)
    values = found.values if isinstance(found, Entry) else of_before(found)
    return with_text(values, path.parent)


ADDED: dict[str, Scalar] = {
    "strategy.largest-weight": 0.0,
    "defence.largest-norm": 0.0,
    "train.replay-examples": 0,
}
"""Keys that earlier runs did not have, with the values that do what those runs did."""


def of_before(flat: dict[str, Scalar]) -> dict[str, Scalar]:
    """Return the configuration of a run of an earlier version as that version understood it.

    Only a run writes `resume-from`, and with it every key that it knows.
    """
    return {**ADDED, **flat} if "resume-from" in flat else flat


def _read(path: Path) -> Entry | dict[str, Scalar]:
    table = read_toml(path)
    app = table_at(table, "tool", "flwr", "app")
    if "config" not in app:
        if "build-system" in table or "project" in table:
            raise ConfigError(
                f"{path} is a pyproject.toml without [tool.flwr.app.config], so no FlowerTune "
                "entry. Give that of an entry, or a recipe (`grandrounds recipes list`)."
            )
        return flatten(table)
    if table_at(table, "project").get("name") == "grandrounds":
        return flatten(table_at(app, "config"))
    written = flatten(table_at(app, "config"), joins_lists=True)
    if not any(key.startswith(ENTRY_SECTIONS) for key in written):
        raise ConfigError(
            f"{path} is the pyproject.toml of another Flower app and no FlowerTune entry: its "
            f"[tool.flwr.app.config] has no key in {', '.join(f'{s}*' for s in ENTRY_SECTIONS)}. "
            "Give that of an entry, or a recipe (`grandrounds recipes list`)."
        )
    federations = table_at(table, "tool", "flwr", "federations")
    federation = table_at(federations, str(federations.get("default", "")))
    sites = table_at(federation, "options").get("num-supernodes")
    known = (*FIELD_OF_KEY, *ALIASES)
    return read_entry(written, sites, known, defaults()["data.held-out-fraction"])


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


def flatten(
    table: Mapping[str, Any], prefix: str = "", *, joins_lists: bool = False
) -> dict[str, Scalar]:
    """Return nested TOML tables as one mapping with dotted keys.

    Parameters
    ----------
    joins_lists : bool
        Whether a list of strings becomes one string with commas; otherwise a list is an error.
    """
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            below = flatten(value, f"{key}.", joins_lists=joins_lists)
            if twice := sorted(flat.keys() & below):
                raise ConfigError(f"{twice[0]} is set twice in one file: as a key and in a table.")
            flat |= below
        elif key in flat:
            raise ConfigError(f"{key} is set twice in one file: as a key and in a table.")
        elif isinstance(value, bool | int | float | str):
            flat[key] = value
        elif key in DAYS and isinstance(value, datetime.date):  # as TOML writes it
            flat[key] = value.isoformat()
        elif joins_lists and isinstance(value, list) and all(isinstance(v, str) for v in value):
            flat[key] = ",".join(value)
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
        If an assignment has no `=`, or names a prompt template that cannot be read.
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
    return with_text(out)


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
    """Return the settings of all layers as one mapping.

    A key overrides its alias in an earlier layer, and an alias its key.
    """
    return overlaid(values for _, values in layers)


def overlaid(mappings: Iterable[Mapping[str, Scalar]]) -> dict[str, Scalar]:
    """Return settings as one mapping, later ones overriding, also through an alias.

    A table is overridden key by key, or whole by a value of its own.
    """
    out: dict[str, Scalar] = {}
    for written in mappings:
        values = _with_tables(written, out)
        for alias, key in ALIASES.items():
            if key in values:
                out.pop(alias, None)
            elif values.get(alias, "") != "":
                out.pop(key, None)
        out |= values
    return out


def _with_tables(values: Mapping[str, Scalar], before: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings with the dotted keys of each table as its JSON, added to what it held."""
    out = {key: value for key, value in values.items() if table_of(key) == key}
    for table in TABLES:
        prefix = f"{table}."
        entries = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if table in out:
            out[table] = _canonical(table, out[table])
        if entries:
            held = out.get(table, before.get(table, ""))
            out[table] = _as_json(table, {**_table(held), **entries})
    return out


def _table(value: Scalar) -> dict[str, Any]:
    """Return the table in a value; empty if there is none, which validation reports."""
    try:
        table = json.loads(value) if isinstance(value, str) and value else {}
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _as_json(key: str, table: Mapping[str, Any]) -> str:
    """Return a table as JSON, sorted unless its order counts."""
    return json.dumps(table, sort_keys=key not in PATTERNS, ensure_ascii=False)


def _canonical(key: str, value: Scalar) -> Scalar:
    """Return the JSON of a table in one spelling; what is none stays as it is."""
    if table := _table(value):
        return _as_json(key, table)
    return "" if isinstance(value, str) and value.split() in (["{}"], ["{", "}"]) else value


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
    "from_adapter": "model.lora.from-adapter",
}
"""Option of a command → key."""


def complete(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return every key with its value, unchecked: what was set, else its default if it applies."""
    default = defaults()
    return settled(without_aliases(values, default)[0], default)


def notes(values: Mapping[str, Scalar], file: Path | None = None) -> list[str]:
    """Return what a reader should know of a command's settings, one sentence each.

    Defaults that do not apply beside the values that were set, and what the FlowerTune entry in
    `file` leaves to its template.
    """
    default = defaults()
    entry = _read(file) if file else None
    said = entry.notes(values) if isinstance(entry, Entry) else []
    return [*said, *map(str, resets(without_aliases(values, default)[0], default))]


def resolve(*layers: Mapping[str, Scalar]) -> Config:
    """Merge layers over the packaged defaults, later ones overriding, and validate the result."""
    return parse(overlaid(layers), defaults())


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute local paths, valid from any working directory.

    Raises
    ------
    ConfigError
        If one is not UTF-8, as a recipe must be.
    """

    def full(name: str) -> str:
        path = found(name) if name not in EMBEDDED_DATA else None
        if path is None and set(name) & set("*?"):  # a pattern of files
            path = Path(name).expanduser()
        whole = str(path.absolute()) if path else name
        if not is_utf8(whole):
            raise ConfigError(f"{whole} is not UTF-8, as a recipe must be. Rename it.")
        return whole

    base, lora = config.model.name, config.lora
    start = full(lora.from_adapter) if lora.from_adapter else ""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=base if names_a_base(base) else full(base)),
        lora=dataclasses.replace(lora, from_adapter=start),
        static=dataclasses.replace(config.static, name=full(config.static.name)),
    )


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old → new` for each difference, except run directories and trackers."""
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {before[key]!r} → {after[key]!r}"
        for key in FIELD_OF_KEY
        if key not in PLACES_AND_TRACKERS and before[key] != after[key]
    ]


def leaderboard_differences(config: Config) -> list[str]:
    """Return why a run is not comparable with FlowerTune's medical leaderboard; empty if it is."""
    reasons = []
    if config.lora.is_continued:
        reasons.append("continued from a trained adapter")
    if config.static.name not in LEADERBOARD_DATA:
        reasons.append(f"static.dataset.name is {place_name(config.static.name)}")
    if config.static.config or config.static.split != TRAIN:
        named = " ".join(filter(None, (config.static.config, config.static.split)))
        reasons.append(f"configuration and split are {named}, not the default and {TRAIN}")
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
