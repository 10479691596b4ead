"""`grandrounds site status`: connected or not, last visit, budgets, disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.options import AsJson
from grandrounds.cli.screen import Screen
from grandrounds.quiet import quiet_libraries
from grandrounds.site.custody.site_file import read_site_file


def status(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the site, or its site.toml.", metavar="FOLDER")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Show whether the site is connected, its last visit, what is left of its budgets, and disk.

    Exit code 0 if agent and SuperNode run and nothing keeps the site from its next visit, else 1.
    Reads no data and loads no base, as `site check` does.
    """
    screen = Screen(True, as_json=as_json)
    site = read_site_file(folder / "site.toml" if folder.is_dir() else folder)
    quiet_libraries()
    from grandrounds.engines.deployment import site_status

    found = site_status.look(site)
    screen.tell(*site_status.words(found))
    screen.emit(found)
    if found["problems"]:
        raise typer.Exit(1)
