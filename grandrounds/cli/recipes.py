"""`grandrounds recipes`: the recipes that come with the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds.cli.options import AsJson, Plain
from grandrounds.cli.screen import Screen, say
from grandrounds.config.packaged import packaged_recipe, packaged_recipes
from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.config.words import command
from grandrounds.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Recipes that come with the package."
)

Name = Annotated[str, typer.Argument(help="Name in `recipes list`.", show_default=False)]


@app.callback()
def root() -> None:
    """Recipes that come with the package."""


@app.command(name="list")
def list_recipes(plain: Plain = False, as_json: AsJson = False) -> None:
    """List the packaged recipes; `--config` takes their names.

    Example: `grandrounds recipes list`
    """
    found = {name: about(name) for name in packaged_recipes()}
    if as_json:
        say(json.dumps(found, indent=2))
        return
    rows = [
        (name, one["base"], f"{one['sites_per_round']} of {one['sites']}", str(one["rounds"]))
        for name, one in found.items()
    ]
    screen = Screen(plain)
    screen.table("recipes", ("name", "base", "sites a round", "rounds"), rows)
    say("run one: grandrounds run NAME", "read one: grandrounds recipes show NAME")


def about(name: str) -> dict[str, Any]:
    """Return what the list tells of a recipe."""
    recipe = packaged_recipe(name)
    config = resolve(load_recipe(recipe.path))
    return {
        "about": recipe.about,
        "base": config.model.name,
        "data": config.static.name,
        "sites": config.data.num_partitions,
        "sites_per_round": config.cohort_size,
        "rounds": config.federation.num_server_rounds,
        "file": str(recipe.path),
    }


@app.command()
def show(name: Name) -> None:
    """Print a packaged recipe.

    Example: `grandrounds recipes show jsl-medllama-3-8b`
    """
    say(packaged_recipe(name).path.read_text(encoding="utf-8").rstrip("\n"))


@app.command()
def copy(
    name: Name,
    to: Annotated[
        Path | None,
        typer.Argument(help="File or folder; default: the current folder.", show_default=False),
    ] = None,
) -> None:
    """Copy a packaged recipe, to be changed; an existing file is not overwritten.

    Example: `grandrounds recipes copy jsl-medllama-3-8b ours.toml`
    """
    recipe = packaged_recipe(name)
    target = (to or Path()).expanduser()
    if target.is_dir():
        target /= recipe.path.name
    if target.exists():
        raise ConfigError(f"{target} exists; give another file, or remove it first.")
    try:
        shutil.copyfile(recipe.path, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
    say(f"{target}: run it with {command('grandrounds', 'run', target)}")
