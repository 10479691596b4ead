"""What must be the same for a run to be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import RunDirectoryError
from grandrounds.server.directory import RunDirectory

SAME_ON_RESUME = (
    "rows",
    "train-examples",
    "held-out-examples",
    "truncated",
    "unlearnable",
    "base",
    "prompt",
)
"""What a site says at roll call that must not change within a run."""


def check_resumable(directory: RunDirectory, config: Config) -> None:
    """Raise `RunDirectoryError` if the run is over, or was started with another configuration."""
    summary = directory.read_json("summary.json")
    if summary and summary["status"] == "completed":
        raise RunDirectoryError(
            f"{directory.path} is a completed run of {summary['rounds']} rounds; there is nothing "
            "to resume. Start a new run for more rounds."
        )
    started_with = recipes.resolve(recipes.load_recipe(directory.path / "config.toml"))
    if changes := recipes.differences(started_with, config):
        raise RunDirectoryError(
            f"{directory.path} was started with another configuration: {'; '.join(changes)}. "
            "Resume without these changes, or start a new run with them."
        )


def check_same_sites(
    before: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]]
) -> None:
    """Raise `RunDirectoryError` if a resumed run would go on with other data, base or prompt."""
    earlier = {site["partition-id"]: site for site in before or ()}
    for new in now:
        if (old := earlier.get(new["partition-id"])) is None:
            continue
        for fact in SAME_ON_RESUME:
            if old[fact] != new[fact]:
                raise RunDirectoryError(
                    f"Site {new['partition-id']} is not what it was when the run started: its "
                    f"{fact} was {old[fact]} and is {new[fact]}. Restore it to resume, or start a "
                    "new run."
                )
