"""Options and arguments shared by several commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Recipe: a .toml file, a name in `recipes list`, or pyproject.toml of a FlowerTune "
        "entry.",
        metavar="NAME|FILE",
    ),
]

Recipe = Annotated[
    Path | None,
    typer.Argument(
        help="Recipe; the same as `--config`.",
        metavar="[RECIPE]",
        show_default=False,
    ),
]

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one key; repeatable.", metavar="KEY=VALUE"),
]

Model = Annotated[
    str | None,
    typer.Option(help="Base model: Hub name, local folder, name in `base list`, or formulary."),
]

FromAdapter = Annotated[
    str | None,
    typer.Option(
        "--from-adapter",
        help="Saved LoRA adapter from which training goes on: a folder, a run directory (its last "
        "adapter) or REPO@REVISION on the Hub. Base, rank, alpha and target modules are its own "
        "unless they are set.",
        metavar="DIR|RUN|REPO@REVISION",
    ),
]

Data = Annotated[
    str | None,
    typer.Option(help="Data: Hub name, .json/.jsonl/.csv/.parquet/.txt file, or formulary."),
]

Rounds = Annotated[int | None, typer.Option(help="Number of training rounds.")]

Sites = Annotated[
    int | None,
    typer.Option(
        "--sites",
        "--num-sites",
        help="Number of sites. With `data.partitioner=natural`, by default one for each value of "
        "`data.partition-by`.",
    ),
]

SitesPerRound = Annotated[
    int | None, typer.Option(help="Number of sites that train in each round.", metavar="N")
]

RunDirectory = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN_DIR")]

Checkpoint = Annotated[
    str,
    typer.Option(
        help="`last`, `best` (lowest median held-out loss of the sites), or a round number.",
        metavar="last|best|ROUND",
    ),
]


OfSite = Annotated[
    str | None,
    typer.Option(
        "--site",
        help="The personal adapter of this site, by number or name, of a run with "
        "`personalisation.name`.",
        metavar="SITE",
    ),
]


class Engine(StrEnum):
    """Where the sites of a run live."""

    in_process = "in-process"
    simulation = "simulation"
    deployment = "deployment"


BenchmarkData = Annotated[
    Path | None,
    typer.Option(help="Folder of benchmark files; default: download from the Hub.", metavar="DIR"),
]

Limit = Annotated[
    int | None,
    typer.Option(help="At most N items of each benchmark: a seeded sample, stratified by answer."),
]

Plain = Annotated[
    bool, typer.Option("--plain", help="Plain text output, without boxes or progress bars.")
]

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="More output: single steps and their details.")
]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the result and errors; no progress, no notes.")
]

AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON document on standard output, and all else on standard "
        "error.",
    ),
]
