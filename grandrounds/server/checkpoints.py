"""Which checkpoint of a run is meant: the last, the best, or the one of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import load_recipe, resolve
from grandrounds.errors import ConfigError, RunDirectoryError, nearest
from grandrounds.server.directory import RunDirectory

WORDS = ("last", "best")
"""What may stand instead of a round."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter that a run has saved."""

    run: RunDirectory
    """The run that it is of."""
    config: Config
    """The run's configuration."""
    round: int
    """The round after which it was saved."""
    folder: Path
    """The adapter, as PEFT loads it."""
    record: Mapping[str, Any]
    """The round's line of metrics.jsonl."""
    is_last: bool
    """Whether the run has saved none after it."""


def find_checkpoint(run_directory: Path, which: str = "last") -> Checkpoint:
    """Return a checkpoint of a run, which may still be going on or have failed.

    Parameters
    ----------
    which : str
        `last`; `best`, the one of lowest held-out loss; or a round's number.

    Raises
    ------
    RunDirectoryError
        If there is no run, it has no checkpoint yet, or not the one asked for.
    ConfigError
        If `which` is none of these.
    """
    if which not in WORDS and not (which.isascii() and which.isdigit()):
        raise ConfigError(
            f"--checkpoint {which!r} is not allowed: give last, best or the number of a round."
            f"{nearest(which, WORDS)}"
        )
    run = RunDirectory.open(run_directory)
    config = resolve(load_recipe(run.path / "config.toml"))
    metrics = run.read_metrics()
    saved = {m["round"]: m for m in metrics if "checkpoint" in m}
    if not saved:
        done = metrics[-1]["round"] if metrics else 0
        first = min(config.train.save_every_round, config.federation.num_server_rounds)
        raise RunDirectoryError(
            f"{run.path} has no checkpoint yet: {done} rounds are finished, and the first is saved "
            f"after round {first}. Wait for it, or go on with a run that ended: grandrounds run "
            f"--resume {run.path}."
        )
    number = _round(run, saved, which)
    folder = run.path / str(saved[number]["checkpoint"])
    if not folder.is_dir():
        raise RunDirectoryError(
            f"{folder} is missing, though metrics.jsonl names it. Restore it, or choose another of "
            f"the checkpoints after round {_listed(saved)} with --checkpoint."
        )
    return Checkpoint(run, config, number, folder, saved[number], number == max(saved))


def _round(run: RunDirectory, saved: Mapping[int, Mapping[str, Any]], which: str) -> int:
    if which == "last":
        return max(saved)
    if which == "best":
        losses = {
            r: m["held-out-loss"] for r, m in saved.items() if m.get("held-out-loss") is not None
        }
        if not losses:
            raise RunDirectoryError(
                f"{run.path} measured no held-out loss at its checkpoints, so none is the best. "
                f"Choose last, or a round: {_listed(saved)}."
            )
        return min(losses, key=lambda r: losses[r])
    if int(which) not in saved:
        raise RunDirectoryError(
            f"{run.path} saved no checkpoint after round {int(which)}; there are some after round "
            f"{_listed(saved)}."
        )
    return int(which)


def _listed(saved: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(saved)))
