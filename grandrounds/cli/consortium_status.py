"""`grandrounds consortium status`: members, connections, and the last run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds import storage
from grandrounds.cli.options import AsJson
from grandrounds.cli.screen import Screen


def status(
    directory: Annotated[Path, typer.Option("--dir", help="Folder of the consortium.")] = Path(
        "consortium"
    ),
    connection: Annotated[
        str | None,
        typer.Option(
            help="Connection to its SuperLink in Flower's config.toml. Default: the one that "
            "`consortium init` wrote, on the server's machine."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the members, who is connected, and how far the last run came.

    Exit code 0 if the SuperLink answers and every member is connected, else 1.
    """
    screen = Screen(True, as_json=as_json)
    from grandrounds.engines.deployment import consortium_status

    found = consortium_status.look(storage.expanded(directory).absolute(), connection)
    screen.tell(*consortium_status.words(found))
    screen.emit(found)
    if found["problems"]:
        raise typer.Exit(1)
