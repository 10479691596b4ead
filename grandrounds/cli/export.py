"""`grandrounds export`: a checkpoint as a PEFT adapter or a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.options import Checkpoint, OfSite, RunDirectory
from grandrounds.cli.screen import say
from grandrounds.config.bases import find_base
from grandrounds.quiet import quiet_libraries


def export(
    run_dir: RunDirectory,
    checkpoint: Checkpoint = "last",
    site: OfSite = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the base model.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Output folder, new or empty; default: a subfolder of `export/` in the run.",
            metavar="FOLDER",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Upload to this Hugging Face Hub repository; a new one is created as private.",
            metavar="OWNER/NAME",
        ),
    ] = None,
) -> None:
    """Export a checkpoint as a PEFT adapter or a merged model, with a model card.

    Examples:

    - `grandrounds export runs/first`

    - `grandrounds export runs/first --checkpoint best --merge --to models/first`

    - `grandrounds export runs/own --site 3 --to models/ward-3`

    - `grandrounds export runs/first --push my-hospital/first-adapter`
    """
    from grandrounds.server.directory import find_checkpoint

    chosen = find_checkpoint(run_dir, checkpoint)
    find_base(chosen.config.model.name)  # fails now if it is not fetched
    quiet_libraries()
    from grandrounds.study import export as exports
    from grandrounds.study.personal import check_whole, of_site

    if site is None:
        check_whole(chosen)
    chosen = chosen if site is None else of_site(chosen, site)
    if push is not None:
        exports.check_repository(push)
    folder = exports.export(chosen, merge=merge, to=to, repository=push, say=say)
    whose = "" if site is None else f"the personal adapter of {chosen.folder.name}, "
    say(f"written: {folder} ({whose}checkpoint after round {chosen.round})")
    if push is not None:
        say(f"uploading to {push}")
        say(f"published: {exports.push(folder, push)}")
