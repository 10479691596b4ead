"""`grandrounds consortium demo`: three hospitals on one machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from grandrounds import storage
from grandrounds.cli.screen import say
from grandrounds.engines.folders import left_behind, own_folder, uninterrupted
from grandrounds.errors import ConfigError, EngineError
from grandrounds.quiet import quiet_libraries

KEPT = Path("consortium-demo")
"""Where it is kept by default."""

LOST = "The folder is removed, with the logs of all processes; --keep keeps it."


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            help="New folder for server, hospitals and run. Default: a temporary one, with --keep "
            f"`{KEPT}`.",
            metavar="DIR",
        ),
    ] = None,
    sites: Annotated[
        int,
        typer.Option(help="Hospitals, of at least 120 rows of the packaged formulary each.", min=2),
    ] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds to train.", min=1, max=20)] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder.")] = False,
) -> None:
    """Rehearse a deployment on this machine: a server, three hospitals, one short run.

    Starts a SuperLink, and an agent and a SuperNode for each hospital, with TLS, keys and
    admissions, on free ports of loopback. Shows what each party sees and refuses, trains the
    embedded base on the packaged formulary, offline, and ends every process.

    Examples:

    - `grandrounds consortium demo`

    - `grandrounds consortium demo --keep --folder rehearsal`
    """
    place = storage.expanded(folder or KEPT).absolute() if folder or keep else None
    if place and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"--folder {place} exists and is not an empty folder. Choose another.")
    quiet_libraries()
    from grandrounds.study import consortium_demo

    consortium_demo.check_rows(sites)
    for line in left_behind():
        say(f"warning: {line}")
    with own_folder() as own:
        home = place or own.path / "demo"
        say(f"a consortium of {sites} hospitals on this machine, in {home}")
        with _removed_unless(keep, home):
            try:
                consortium_demo.demonstrate(own, home, sites, rounds, say)
            except EngineError as error:
                raise EngineError(f"{error} {'' if keep else LOST}".rstrip()) from error
        say("", "all processes have ended")
        if keep:
            say(f"kept: {home}", *(f"  {line}" for line in consortium_demo.next_commands(home)))
        else:
            say(f"removed: {home}; --keep keeps it")


@contextmanager
def _removed_unless(keep: bool, home: Path) -> Iterator[None]:
    """Make a folder; remove it at the end, however the block ends."""
    with storage.writing(str(home), "Choose another with --folder.", ConfigError):
        home.mkdir(parents=True, exist_ok=True, mode=0o711)
    try:
        yield
    finally:
        if not keep:
            with uninterrupted():
                shutil.rmtree(home, ignore_errors=True)
