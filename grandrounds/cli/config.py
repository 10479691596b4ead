"""`grandrounds config`: the configuration that a command would run with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds.cli.options import (
    Assignments,
    ConfigFile,
    Data,
    Model,
    Recipe,
    Rounds,
    Sites,
    SitesPerRound,
)
from grandrounds.cli.request import tell
from grandrounds.cli.screen import say
from grandrounds.config import recipes
from grandrounds.config.keys import ALIASES, PLACES, table_of
from grandrounds.config.recipes import Layer, to_toml
from grandrounds.study.chosen import chosen_recipe
from grandrounds.study.sites import with_sites

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Show the resolved configuration."
)


@app.callback()
def root() -> None:
    """Show the resolved configuration."""


@app.command()
def show(
    recipe: Recipe = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    data: Data = None,
    rounds: Rounds = None,
    sites: Sites = None,
    sites_per_round: SitesPerRound = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every key of the resolved configuration, and where each that differs came from.

    The output is a recipe: TOML, with the origin and the default as comments.

    Examples:

    - `grandrounds config show configs/smollm2-135m-laptop.toml --rounds 5`

    - `grandrounds config show --data flashcards.jsonl --sites 4 > recipe.toml`
    """
    file: Path | None = chosen_recipe(recipe, config)
    layers = recipes.layers_of(
        file, assignments, model=model, data=data, rounds=rounds, sites=sites
    )
    layers = with_sites(layers, sites_per_round)
    found, notes = described(layers, file)
    if as_json:
        say(json.dumps({"keys": found, "notes": notes}, indent=2))
        return
    tell(notes, aside=True)
    for key, about in found.items():
        line = to_toml({key: about["value"]}).rstrip("\n")
        if about["value"] != about["default"]:
            default = to_toml({key: about["default"]}).partition(" = ")[2].rstrip("\n")
            line += f"  # {about['from']}; default {default}"
        say(line)


def described(
    layers: Sequence[Layer], file: Path | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return value, default and origin of every key, and what to know of the settings.

    An origin is a recipe, an option, `reset` (a default that does not apply), `auto` (a default
    that others settle) or `default`.
    """
    settings = recipes.merged(layers)
    flat, default = recipes.resolve(settings).flat(), recipes.defaults()
    origin = {
        ALIASES.get(k, table_of(k)): name
        for name, values in layers
        for k, v in values.items()
        if v != "" or k not in ALIASES
    }
    found = {}
    for key, value in flat.items():
        unset = "default" if value == default[key] else _unset(default[key])
        found[key] = {"value": value, "default": default[key], "from": origin.get(key, unset)}
    return {key: about for key, about in found.items() if key not in PLACES or about["value"]}, (
        recipes.notes(settings, file)
    )


def _unset(default: Any) -> str:
    return "auto" if default == "auto" else "reset"
