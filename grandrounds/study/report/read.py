"""Reads a run directory as far as it is written: of a run that completed, failed or is going on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import GrandRoundsError, RunDirectoryError, first_line
from grandrounds.server.directory import RunDirectory
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.tables import is_number
from grandrounds.wire.names import SiteNames, names_of

EVALUATION = "evaluation/evaluation.json"

QUIET_SECONDS = 600
"""After this long without a new line, the page of a run without a summary says it may be dead."""


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory."""

    path: Path
    name: str
    config: Config
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    summary: Mapping[str, Any]
    """Empty until the run ends."""
    ledger: Mapping[str, Any]
    plan: Mapping[str, Any]
    sites: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    """One for each evaluated folder and protocol."""
    hashes: Mapping[str, str]
    """File → SHA-256."""
    quiet_seconds: float
    """Since the last line of metrics was written."""

    @property
    def status(self) -> str:
        """`completed`, `failed`, `stopped`, or `going` if there is no summary."""
        return str(self.summary.get("status", "going"))

    @property
    def names(self) -> SiteNames:
        """How its sites are called."""
        return names_of(self.sites)

    @property
    def rounds(self) -> int:
        """The last finished round."""
        return int(self.metrics[-1]["round"]) if self.metrics else 0

    @property
    def planned_rounds(self) -> int:
        """The number of rounds configured."""
        return self.config.federation.num_server_rounds

    @property
    def last_shown(self) -> int:
        """The last round on the axes: the last one configured as long as the run may continue."""
        return self.rounds if self.status == "completed" else max(self.planned_rounds, self.rounds)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all finished rounds."""
        return sum(seconds for _, seconds in self.values("seconds"))

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        """The metrics of the rounds that trained."""
        return [m for m in self.metrics if m["round"] > 0]

    def values(self, key: str) -> list[tuple[int, float]]:
        """Return (round, value) of every line of the metrics that has a number under a key."""
        return [(m["round"], float(m[key])) for m in self.metrics if is_number(m.get(key))]


def folders(run: RunFiles) -> dict[str, str]:
    """Return the absolute paths of a run → what a page shows in their place."""
    places = (run.config.model.name, run.config.static.name)
    named = {name: Path(name).name for name in places if Path(name).is_absolute()}
    return {**named, str(run.path): run.name}


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises
    ------
    RunDirectoryError
        If it is not a run directory, or one of its files is not what a run writes.
    """
    directory = RunDirectory.open(path)
    path = directory.path
    try:
        config = recipes.resolve(recipes.load_recipe(path / "config.toml"))
    except GrandRoundsError as error:
        raise RunDirectoryError(
            f"{path / 'config.toml'} is not a configuration of this version: {error}"
        ) from error
    metrics = _read_metrics(directory)
    written = path / "metrics.jsonl"
    if not written.is_file():
        written = path / "config.toml"
    return RunFiles(
        path=path,
        name=path.name,
        config=config,
        metrics=metrics,
        summary=_read(path / "summary.json", dict) or {},
        ledger=_read(path / "ledger.json", dict) or {},
        plan=_read(path / "plan.json", dict) or {},
        sites=_sites(path / "sites.json"),
        environment=_read(path / "environment.json", dict) or {},
        evaluations=_evaluations(path),
        hashes=_hashes(path),
        quiet_seconds=max(0.0, time.time() - written.stat().st_mtime),
    )


def _read_metrics(directory: RunDirectory) -> list[dict[str, Any]]:
    file = directory.path / "metrics.jsonl"
    try:
        lines = directory.read_metrics()
    except ValueError as error:
        raise RunDirectoryError(f"{file} is not what a run writes ({error}).") from error
    for i, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("round"), int):
            raise RunDirectoryError(f"{file} is not what a run writes: line {i} has no round.")
    return lines


def _sites(file: Path) -> list[dict[str, Any]]:
    sites = _read(file, list) or []
    if not all(isinstance(site, dict) for site in sites):
        raise RunDirectoryError(f"{file} is not what a run writes: a site is not an object.")
    return list(sites)


def _read(file: Path, kind: type) -> Any:
    """Return the content of a JSON file; None if there is none."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(content, kind):
        raise RunDirectoryError(
            f"{file} holds a {type(content).__name__}, not the {kind.__name__} that a run writes."
        )
    return content


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """Return (round, folder) of the checkpoints of a run, by round."""
    found = [
        (int(folder.name.removeprefix("peft_")), folder)
        for folder in path.glob("peft_*")
        if folder.name.removeprefix("peft_").isdigit()
    ]
    return sorted(found)


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the run and of its checkpoints."""
    found = []
    for folder in (path, *(folder for _, folder in checkpoints(path))):
        content = _read(folder / EVALUATION, dict)
        if content is None:
            continue
        for evaluation in content.get("evaluations") or [content]:
            _check_evaluation(folder / EVALUATION, evaluation)
            found.append(evaluation)
    return found


def _check_evaluation(file: Path, evaluation: Any) -> None:
    try:
        for row in evaluation["rows"]:
            for part in (row, *(row.get("groups") or ())):
                low, high = part["interval"]
                numbers = (part["correct"], part["n"], part["accuracy"], low, high)
                if not all(map(is_number, numbers)):
                    raise TypeError(f"{numbers} are not all numbers")
            _ = row["model"], row["title"], evaluation["protocol"]
            if evaluation["protocol"] == GREEDY:
                figures = (row["f1"]["mean"], row["loss"]["nats_per_token"])
                if not all(map(is_number, (*figures, *(row["f1"]["interval"] or ())))):
                    raise TypeError(f"{figures} are not all numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{file} is not what grandrounds evaluate writes ({error}). Evaluate again, or remove "
            "that file."
        ) from error


def _hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of the configuration and of each checkpoint's weights."""
    files = [path / "config.toml"]
    files += [folder / "adapter_model.safetensors" for _, folder in checkpoints(path)]
    hashes = {}
    for file in files:
        if file.is_file():
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            hashes[str(file.relative_to(path))] = digest
    return hashes
