"""Options that several commands have, said once: what a recipe is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="A recipe from configs/, or the pyproject.toml of a FlowerTune entry.",
        metavar="FILE",
    ),
]

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one key; repeatable.", metavar="KEY=VALUE"),
]

Model = Annotated[
    str | None, typer.Option(help="Base model: hub name, local folder, or formulary.")
]

Data = Annotated[
    str | None,
    typer.Option(help="Data: hub name, .json/.jsonl/.csv/.parquet file, or formulary."),
]

Rounds = Annotated[int | None, typer.Option(help="Rounds of training.")]
