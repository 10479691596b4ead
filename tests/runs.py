"""Runs played in this process, and the files they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from grandrounds import client_app, server_app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.server.listeners import Listener
from tests.listening import Tell, Telling
from tests.places import ROOT

Settings = dict[str, Any]
Sites = Callable[[Message, Context], Message]

GOOD_SITES: Sites = client_app.app


def interrupted_at(event: str, count: int = 1) -> Telling:
    """Return a listener that raises KeyboardInterrupt at the `count`-th event of a name."""
    seen = 0

    def listen(name: str, data: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += name == event
        if name == event and seen == count:
            raise KeyboardInterrupt

    return Telling(listen)


def grid_of(
    config: Config, sites: Sites = GOOD_SITES, nodes: list[dict[str, Any]] | None = None
) -> InProcessGrid:
    """Return the grid of a run.

    Parameters
    ----------
    nodes
        Entries to add to the node config of each site.
    """
    grid = InProcessGrid(sites, config.flat(), config.data.num_partitions)
    if nodes is not None:
        for node, context in zip(nodes, grid._contexts.values(), strict=True):
            context.node_config |= node
    return grid


def play(
    settings: Settings,
    sites: Sites = GOOD_SITES,
    listener: Listener | Tell | None = None,
    grid: InProcessGrid | None = None,
    **changes: Any,
) -> Path:
    """Play a run in this process; return its directory.

    Parameters
    ----------
    listener
        Told of the run; a function is called with (event, data).
    grid
        Used instead of one made of `sites`.
    changes
        Configuration keys that replace those of `settings`.
    """
    config = recipes.resolve({**settings, **changes})
    if not isinstance(listener, Listener):
        listener = Telling(listener) if listener else Listener()
    server_app.federate(grid or grid_of(config, sites), config, listener)
    return Path(config.federation.run_directory)


def options(settings: Settings) -> list[str]:
    """Return settings as command-line options, `--set key=value`."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


# --- Runs of before -------------------------------------------------------------------------------

RUNS = ROOT / "tests" / "fixtures" / "runs"
"""Run directories written by an earlier version: the embedded base, four sites, four rounds."""


def copy_of(name: str, folder: Path) -> Path:
    """Copy a run directory of the fixtures; return the copy."""
    return shutil.copytree(RUNS / name, folder / name)


# --- What a run leaves ----------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def config_of(run: Path) -> Config:
    return recipes.resolve(recipes.load_recipe(run / "config.toml"))


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / "summary.json")
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; an incomplete last line is skipped."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def unfinished_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of unfinished.jsonl; none if no round was lost."""
    file = run / "unfinished.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def adapter_bytes(run: Path, checkpoint: str = "") -> bytes:
    """Return the adapter file of a checkpoint, by default the last one."""
    folder = checkpoint or summary_of(run)["adapter"]
    return (run / folder / "adapter_model.safetensors").read_bytes()
