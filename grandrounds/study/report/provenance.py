"""Where a run comes from: recipe, commands that repeat it, versions and hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import automatic, recipes
from grandrounds.config.keys import FIELD_OF_KEY, PLACES, Config
from grandrounds.config.values import Scalar
from grandrounds.config.words import command
from grandrounds.server.described import Sites, engine_options
from grandrounds.server.listeners.start_rows import data_rows, recipe_rows
from grandrounds.study.report.figures import Section
from grandrounds.study.report.read import RunFiles
from grandrounds.study.tables import NONE, Table


def sections(run: RunFiles) -> list[Section]:
    """Return how to reproduce a run, its recipe, and its versions and hashes."""
    again = command("grandrounds", "run", "--config", run.path / "config.toml")
    commands = [
        ("From this run directory", again + engine_options(run.sites)),
        (
            "From any folder that has its base and data, with the same version",
            repeat_command(run.config) + engine_options(run.sites),
        ),
    ]
    environment = [
        Table(("package", "version"), version_rows(run.environment), "Server versions"),
        Table(("item", "value"), site_rows(run.sites), "Sites"),
        Table(("file", "SHA-256"), list(run.hashes.items()), "Hashes"),
    ]
    return [
        Section("repeat", "Reproduce", commands=commands),
        Section("recipe", "Recipe", tables=recipe_tables(run.config, run.sites)),
        Section("environment", "Versions and hashes", tables=environment),
    ]


def differing(config: Config) -> dict[str, Scalar]:
    """Return the keys that differ from the packaged defaults; places are left out.

    A value that `auto` stands for in this configuration is a default.
    """
    default, flat = recipes.defaults(), automatic.unsettle(config.flat())
    return {
        key: flat[key] for key in FIELD_OF_KEY if key not in PLACES and flat[key] != default[key]
    }


def value_text(value: Scalar) -> str:
    """Format a value as in TOML, strings without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value) or '""'


def recipe_tables(config: Config, sites: Sites) -> list[Table]:
    """Return a summary of the recipe, the keys changed from the defaults, and all others."""
    default, flat = recipes.defaults(), config.flat()
    changed = differing(config)
    rows = [(key, value_text(value), value_text(default[key])) for key, value in changed.items()]
    rest = [(key, value_text(flat[key])) for key in FIELD_OF_KEY if key not in (*changed, *PLACES)]
    found = [Table(("item", "value"), [*recipe_rows(config), *data_rows(config, sites)], "Summary")]
    if rows:
        found.append(Table(("key", "value", "default"), rows, "Changed from the defaults"))
    return [*found, Table(("key", "value"), rest, f"Defaults: {len(rest)} keys")]


def repeat_command(config: Config) -> str:
    """Return `grandrounds run` with `--set` for every key that is not a default."""
    words = ["grandrounds", "run"]
    for key, value in differing(config).items():
        literal = recipes.to_toml({key: value}).partition(" = ")[2].strip()
        if isinstance(value, str) and recipes.parse_overrides([f"{key}={value}"])[key] == value:
            literal = value
        words += ["--set", f"{key}={literal}"]
    return command(*words)


def version_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the versions in an environment.json."""
    own = ("grandrounds", "python", "platform", "cpu")
    packages: Mapping[str, Any] = environment.get("packages") or {}
    return [
        *((name, str(environment[name])) for name in own if environment.get(name)),
        *((name, str(found or "not installed")) for name, found in packages.items()),
    ]


def site_rows(sites: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what the sites reported, each distinct value once."""
    names = {
        "base": "base (fingerprint)",
        "prompt": "prompt (hash)",
        "device": "device",
        "precision": "precision",
        "version": "grandrounds",
        "torch": "torch",
        "python": "python",
        "threads": "threads",
        "cpu-matmul": "CPU matrix products",
    }
    rows = []
    for key, name in names.items():
        said = list(dict.fromkeys(str(s[key]) for s in sites if key in s))
        rows.append((name, ", ".join(said) or NONE))
    return rows
