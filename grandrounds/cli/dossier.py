"""`grandrounds dossier`: what an ethics board needs of a run, and its verification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grandrounds.cli.screen import say
from grandrounds.config.words import counted
from grandrounds.errors import ConfigError, DataError


def dossier(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR|CONSORTIUM",
            help="Run directory, or a consortium's folder that holds one.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file; default: `dossier.html` in the run. The JSON is written beside it.",
            metavar="FILE.html",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON, and write no file.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Recompute a dossier, page or JSON, from the run's files; exit with 1 if it "
            "differs.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Write what an ethics board needs of a run that has ended, every line with its source.

    Base, data by site, recipe, approval, what left each site, guarantee and audit, evaluation with
    the base, forgetting, versions and packages. What no file records is named, with what would
    record it.

    Examples:

    - `grandrounds dossier runs/first`

    - `grandrounds dossier runs/first --verify runs/first/dossier.html`
    """
    if verify is not None:
        if as_json or out is not None:
            raise ConfigError("--verify writes nothing: leave out --out and --json.")
        _verify(target, verify)
        return
    if as_json:
        if out is not None:
            raise ConfigError("--json prints the dossier: leave out --out.")
        from grandrounds.storage import json_bytes
        from grandrounds.study.dossier.build import dossier_of
        from grandrounds.study.dossier.written import run_in

        typer.echo(json_bytes(dossier_of(run_in(target)).as_dict()).decode(), nl=False)
        return
    from grandrounds.study.dossier.written import write_dossier

    written = write_dossier(target, out)
    lines = [one for _, one in written.dossier.lines()]
    missing = sum(not one.is_recorded for one in lines)
    told = f"{counted(len(lines), 'line')}, {missing} not recorded"
    say(f"written: {written.file} ({told}) and {written.json_file}")
    say(f"digest: {written.digest}")


def _verify(target: Path, file: Path) -> None:
    from grandrounds.study.dossier.verify import verify

    verdict = verify(target, file)
    for finding in verdict.findings:
        say(finding)
    if not verdict.holds:
        raise DataError(
            f"{file} is refuted: {counted(len(verdict.findings), 'difference')} from the files of "
            f"{target}, listed above."
        )
    checked = f"{counted(verdict.lines, 'line')} of {counted(verdict.files, 'file')}"
    say(f"verified: {checked}, digest {verdict.digest}")
