"""A run in Flower's own processes: the app they execute, and its run directory, watched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grandrounds
from grandrounds.config.keys import Config
from grandrounds.config.recipes import defaults, to_toml
from grandrounds.config.values import Scalar
from grandrounds.config.words import is_utf8
from grandrounds.engines.flower import tail
from grandrounds.errors import ConfigError
from grandrounds.server import states
from grandrounds.server.directory import (
    KEPT,
    NONE_FINISHED,
    RESUME_WITH,
    RunDirectory,
    default_run_directory,
)
from grandrounds.server.listeners import Listener

APP = """[project]
name = "grandrounds"
version = "{version}"
description = "Grand Rounds, as installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "grandrounds"

[tool.flwr.app.components]
serverapp = "grandrounds.server_app:app"
clientapp = "{clientapp}:app"

[tool.flwr.app.config]
{config}"""
"""An app without code: Flower's processes import the installed package."""


LOGS = "flower-logs"
"""Folder of a run directory: the logs of Flower's programs where the run failed."""

KEPT_NOTE = re.compile(f" (?:{KEPT}|{NONE_FINISHED}){RESUME_WITH}.*", re.IGNORECASE)
"""The last sentence of an error's text from the server: what is kept, and how to resume."""

OF_OURS = "grandrounds.errors."
"""In a traceback: the error is one of ours."""


class Watcher:
    """Tells a listener what another process writes to a run directory."""

    def __init__(self, path: Path, listener: Listener) -> None:
        self._directory = RunDirectory(path)
        self._listener = listener
        saved = states.rounds(path)
        self._last_round = saved[-1] if saved else -1
        self._resumed_after = self._last_round if saved else None
        written = ("plan.json", "sites.json", "summary.json")
        self._told = {name: self._modified(name) for name in written}

    def look(self) -> None:
        """Tell the listener what is new since the last look."""
        plan = self._new("plan.json")
        if plan is not None:
            place = {"directory": str(self._directory.path), "resumed-after": self._resumed_after}
            self._listener.on_plan({**plan, **place})
        sites = self._new("sites.json")
        if sites is not None:
            self._listener.on_roll_call(sites)
        for record in self._directory.read_metrics():
            if record["round"] > self._last_round:
                self._last_round = record["round"]
                self._listener.on_round(record)

    def summary(self) -> dict[str, Any]:
        """Return the summary of this run; empty if there is none yet."""
        return dict(self._new("summary.json") or {})

    def _modified(self, name: str) -> int:
        file = self._directory.path / name
        return file.stat().st_mtime_ns if file.exists() else 0

    def _new(self, name: str) -> Any:
        modified = self._modified(name)
        if modified == self._told[name]:
            return None
        self._told[name] = modified
        return self._directory.read_json(name)


def write_app(folder: Path, clientapp: str = "grandrounds.client_app") -> Path:
    """Write a Flower app without code; return its folder.

    Parameters
    ----------
    clientapp : str
        Module of the ClientApp.
    """
    folder.mkdir()
    text = APP.format(
        version=grandrounds.__version__, clientapp=clientapp, config=to_toml(defaults())
    )
    (folder / "pyproject.toml").write_text(text)
    return folder


def mark_stopped(directory: RunDirectory) -> None:
    """Record that a run was stopped by ending its server from outside."""
    if metrics := directory.read_metrics():
        rounds = metrics[-1]["round"]
        summary = {"status": "stopped", "reason": "interrupted", "rounds": rounds}
        directory.write_json("summary.json", summary)


def with_run_directory(config: Config) -> tuple[dict[str, Scalar], Path]:
    """Return the flat configuration with an absolute run directory, and the folder written to.

    Raises
    ------
    ConfigError
        If the folder is not UTF-8, as Flower's run config must be.
    """
    new = Path(config.federation.run_directory or default_run_directory(config))
    flat = {**config.flat(), "run-directory": str(new.expanduser().absolute())}
    directory = Path(config.federation.resume_from or str(flat["run-directory"]))
    if not is_utf8(str(directory)):
        raise ConfigError(
            f"{directory} is not UTF-8, as Flower requires. Rename it, or leave out --engine."
        )
    return flat, directory


def why_it_ended(summary: Mapping[str, Any], reason: str, log: Path) -> str:
    """Return the cause that the run gave, else Flower's reason, else the last line of a log.

    An error's text from the server ends with its own note of how to resume, which knows no engine.
    """
    reason = KEPT_NOTE.sub("", reason.partition("\n")[0])
    told = summary.get("reason") or reason.partition("exception: ")[2] or reason
    return told or tail(log, lines=1) or "no reason given"


def kept_logs(home: Path, directory: Path) -> str:
    """Copy the logs of Flower's programs into the run directory; return a note of where they are.

    A run that failed before its first measurement has no directory. Then the note is the end of the
    run's log, unless the run failed with an error of ours, which says all that there is to say.
    """
    logs = sorted(home.glob("*.log"))
    if logs and directory.is_dir():
        target = directory / LOGS
        target.mkdir(exist_ok=True)
        for log in logs:
            shutil.copyfile(log, target / log.name)
        return f"(Flower's logs: {target})"
    end = tail(home / "run.log")
    return f"The end of Flower's log:\n{end}" if end and OF_OURS not in end else ""
