"""`grandrounds site export`: a site's personal adapter, for its own use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.screen import say
from grandrounds.config.words import command
from grandrounds.quiet import quiet_libraries
from grandrounds.site.custody.site_file import read_site_file


def export(
    to: Annotated[
        Path, typer.Option("--to", help="Output folder, new or empty.", metavar="FOLDER")
    ],
    run: Annotated[
        str,
        typer.Argument(
            help="Key of the run, or its first digits, as `grandrounds site runs` lists it; "
            "default: the only run with a personal adapter."
        ),
    ] = "",
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The site's site.toml.", metavar="site.toml")
    ] = Path("site.toml"),
) -> None:
    """Write the site's personal adapter as PEFT loads it; nothing of it is sent anywhere."""
    site = read_site_file(config)
    quiet_libraries()
    from grandrounds.site.custody import own_adapter, state

    folder = to.expanduser().absolute()
    with state.opened(site.place(site.agent.state)) as kept:
        facts = own_adapter.export(site, kept, run, folder)
    say(
        f"written: {folder} ({facts['personalisation']}, run {facts['run']}, after round "
        f"{facts['round']})",
        "it was made of this site's data, and can reveal them: it is for this site",
        f"next: {command('grandrounds', 'evaluate', folder)}",
    )
