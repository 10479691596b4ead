"""`grandrounds study`: recipes x seeds x arms in a file, played, continued and made into tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds import storage
from grandrounds.cli.options import AsJson, Plain, Quiet
from grandrounds.cli.request import tell
from grandrounds.cli.screen import Screen
from grandrounds.config.words import command, counted
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.study.studies.cells import Cell, Lines, cells_of, chosen
from grandrounds.study.studies.file import Study, read_study

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Play the recipes of a study over seeds and arms, and make tables of the results.",
)

File = Annotated[Path, typer.Argument(help="Study, such as those in studies/.", metavar="FILE")]
Out = Annotated[
    Path | None,
    typer.Option(help="Study directory; default: beside FILE, without `.toml`.", metavar="DIR"),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Play a recipe, an arm, or cells such as `fedavg/run/seed-*` only; repeatable.",
        metavar="NAME",
    ),
]


@app.command()
def run(
    file: File,
    only: Only = None,
    jobs: Annotated[int, typer.Option(help="Processes that play at the same time.", min=1)] = 1,
    seconds: Annotated[
        float | None,
        typer.Option(help="Begin no cell after so many seconds; the command continues.", min=0),
    ] = None,
    out: Out = None,
    plain: Plain = False,
    quiet: Quiet = False,
) -> None:
    """Play what is missing in a study directory.

    A cell is an adapter of one recipe, arm and seed, played as `grandrounds run` or `grandrounds
    compare` would. Each finished cell is a line of cells.jsonl. The command may be stopped at any
    time and continues; a cell whose settings have changed is played anew, beside the old one.

    Examples:

    - `grandrounds study run studies/sample.toml`

    - `grandrounds study run studies/aggregation.toml --only fedavg --jobs 2 --seconds 600`
    """
    if seconds is not None and not seconds < float("inf"):
        raise ConfigError(f"--seconds = {seconds:g} must be a number of seconds.")
    screen = Screen(plain, quiet=quiet)
    screen.working("reading the study")
    _, cells, folder, lines = _opened(file, out)
    wanted = chosen(cells, only or ())
    done = [cell for cell in wanted if lines.of(cell) is not None]
    changed = [cell for cell in wanted if lines.has_changed(cell)]
    kept = f", {len(done)} played before" if done else ""
    screen.tell(f"study in {folder}: {counted(len(wanted), 'cell')}{kept}")
    if changed:
        them = ", ".join(cell.name for cell in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        tell([f"played anew, their settings have changed: {them}{more}; the old ones are kept"])
    if len(done) == len(wanted):
        return
    from grandrounds.study.studies.play import play

    failed: list[str] = []
    count = len(done)

    def listen(event: str, facts: Mapping[str, Any]) -> None:
        nonlocal count
        if event == "begun":
            screen.working(", ".join(facts["cells"]))
        elif event == "played":
            count += 1
            screen.tell(f"{count}/{len(wanted)}  {_told(facts)}")
        else:
            failed.extend(facts["cells"])
            tell([f"{', '.join(facts['cells'])}: {facts['error']}"], "warning")

    again = command("grandrounds", "study", "run", file, *(["--out", out] if out else []))
    try:
        missing = play(wanted, folder, jobs, seconds, listen)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished cells are kept; {again} continues") from None
    screen.still()
    if failed:
        raise RunDirectoryError(f"{counted(len(failed), 'cell')} failed: {', '.join(failed)}.")
    if missing:
        screen.tell(f"time is up: {counted(len(missing), 'cell')} left; {again} continues")


@app.command()
def table(
    file: File,
    into: Annotated[
        Path | None,
        typer.Option(help="Page whose marked tables are replaced.", metavar="PAGE"),
    ] = None,
    out: Out = None,
) -> None:
    """Print a study's tables as Markdown, or put them into a page.

    Figures are means over seeds with 95 % intervals (Student's t); differences are paired by seed.
    A page holds a table between `<!-- study FILE, table NAME: begin -->` and `<!-- end of the table
    -->`.

    Examples:

    - `grandrounds study table studies/aggregation.toml`

    - `grandrounds study table studies/aggregation.toml --into docs/aggregation.md`
    """
    from grandrounds.study.studies import tables

    study, cells, _, lines = _opened(file, out)
    if not study.tables:
        raise ConfigError(f"{file} has no [[tables]]: add one, with a name and columns.")
    tables.check_figures(study, lines)
    if into is not None:
        text, count = tables.into_page(into, study, cells, lines)
        if not count:
            name = tables.study_name(study)
            marker = tables.BEGIN.format(file=name, name=study.tables[0].name)
            raise ConfigError(f"{into} has no table of {name}: add {marker} and {tables.END}.")
        advice = "The page is as it was."
        with storage.writing(str(into), advice, RunDirectoryError):
            storage.write_text(into, text)
        typer.echo(f"written: {counted(count, 'table')} into {into}")
        return
    for made in tables.tables_of(study, cells, lines):
        if not made.rows:
            raise RunDirectoryError(
                f"no cell of table {made.title!r} has been played: "
                f"{command('grandrounds', 'study', 'run', file)}"
            )
        typer.echo(f"{tables.markdown(study, made, cells, lines)}\n")


@app.command()
def status(file: File, out: Out = None, plain: Plain = False, as_json: AsJson = False) -> None:
    """List the cells of a study: played, changed since, or missing.

    Examples:

    - `grandrounds study status studies/aggregation.toml`
    """
    screen = Screen(plain, as_json=as_json)
    study, cells, folder, lines = _opened(file, out)
    rows, states = [], []
    for cell in cells:
        line = lines.of(cell)
        state = "played" if line else "changed" if lines.has_changed(cell) else "missing"
        states.append({"cell": cell.name, "state": state, "hash": cell.hash})
        rows.append((cell.name, state, cell.hash, f"{line['seconds']:.1f}" if line else "-"))
    screen.table(study.title, ("cell", "state", "hash", "seconds"), rows)
    played = sum(one["state"] == "played" for one in states)
    screen.notes([f"{played} of {counted(len(cells), 'cell')} played in {folder}"])
    screen.emit({"title": study.title, "folder": str(folder), "cells": states})


def _opened(file: Path, out: Path | None) -> tuple[Study, Sequence[Cell], Path, Lines]:
    study = read_study(file)
    folder = storage.expanded(out) if out else study.folder
    if folder.is_file():
        raise RunDirectoryError(f"{folder} is a file: give another folder with --out.")
    return study, cells_of(study), folder, Lines(folder)


def _told(line: Mapping[str, Any]) -> str:
    figures = line["figures"]
    shares = [
        f"{name} {100 * figures[name]:.1f} %" for name in ("private", "public") if name in figures
    ]
    loss = [f"loss {figures['held-out-loss']:.3f}"] if "held-out-loss" in figures else []
    return "  ".join([line["cell"], *loss, *shares, f"{line['seconds']:.1f} s"])
