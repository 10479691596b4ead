"""`grandrounds docs`: the documentation that comes with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from grandrounds.cli.screen import say
from grandrounds.config.packaged import page, pages


def docs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PAGE]", help="Page; without one, all are listed.", show_default=False
        ),
    ] = None,
    path: Annotated[
        bool, typer.Option("--path", help="Print the page's place instead of its text.")
    ] = False,
) -> None:
    """Print a page of the documentation, as Markdown.

    The pages come with the package and need no network.

    Examples:

    - `grandrounds docs`

    - `grandrounds docs deployment | less`
    """
    if name is None:
        titles = {key: _title(file.read_text(encoding="utf-8")) for key, file in pages().items()}
        width = max(map(len, titles))
        say(*(f"{key:<{width}}  {title}" for key, title in titles.items()))
        return
    file = page(name)
    say(str(file) if path else file.read_text(encoding="utf-8").rstrip("\n"))


def _title(text: str) -> str:
    """Return a page's first heading."""
    return next((line[2:] for line in text.split("\n") if line.startswith("# ")), "")
