"""`grandrounds export`: the command. Nothing heavy is loaded before the arguments are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.screen import Screen
from grandrounds.quiet import quiet_libraries


def export(
    run_dir: Annotated[Path, typer.Argument(help="The run.", metavar="RUN_DIR")],
    checkpoint: Annotated[
        str,
        typer.Option(
            help="`last`, `best` (lowest held-out loss), or the number of a round.",
            metavar="last|best|ROUND",
        ),
    ] = "last",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Merge the adapter into its base: a whole model."),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write, not there yet or empty; default: below `export/` in the run.",
            metavar="FOLDER",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Upload it to this repository of the Hugging Face hub; a new one is private.",
            metavar="OWNER/NAME",
        ),
    ] = None,
) -> None:
    """Write a run's checkpoint for others: a plain PEFT adapter or a whole model, with its card.

    Examples:

    - `grandrounds export runs/first`

    - `grandrounds export runs/first --checkpoint best --merge --to models/first`

    - `grandrounds export runs/first --push my-hospital/first-adapter`
    """
    screen = Screen(plain=True)
    from grandrounds.server.directory import find_checkpoint

    chosen = find_checkpoint(run_dir, checkpoint)
    quiet_libraries()
    from grandrounds.study import export as exports

    if push is not None:
        exports.check_repository(push)
    folder = exports.export(chosen, merge=merge, to=to, repository=push, say=screen.say)
    screen.say(f"written: {folder} (checkpoint after round {chosen.round})")
    if push is not None:
        screen.say(f"uploading to {push}")
        screen.say(f"published: {exports.push(folder, push)}")
