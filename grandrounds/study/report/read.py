"""Reads a run directory as far as it is written: of a run that completed, failed or is going on.

What is damaged is left out, and told.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.words import counted
from grandrounds.errors import GrandRoundsError, RunDirectoryError, first_line
from grandrounds.server import states
from grandrounds.server.directory import RunDirectory, records_of
from grandrounds.server.guarantees import AUDIT
from grandrounds.server.unfinished import AFTER, unfinished_of
from grandrounds.storage import sha256_of
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
    audit: Mapping[str, Any]
    """Of privacy, if the recipe was audited; else empty."""
    quiet_seconds: float
    """Since the last line of metrics was written."""
    unfinished: Sequence[Mapping[str, Any]] = ()
    """The lines of unfinished.jsonl: what was sent in rounds that failed or were interrupted."""
    unread: Sequence[str] = ()
    """Files that cannot be read and why, and what is shown in their place."""

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

    def lost_after(self, number: int | None) -> list[Mapping[str, Any]]:
        """Return the unfinished rounds after a finished one; None: before any."""
        return [line for line in self.unfinished if line[AFTER] == number]

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
    """Read a run directory, as much of it as can be read.

    Raises
    ------
    RunDirectoryError
        If it is not a run directory, or neither its configuration nor a copy of it can be read.
    """
    path = RunDirectory.open(path).path
    unread: list[str] = []
    written = path / "metrics.jsonl"
    if not written.is_file():
        written = path / "config.toml"
    return RunFiles(
        path=path,
        name=path.name,
        config=_config(path, unread),
        metrics=_metrics(path, unread),
        summary=_summary(path, unread),
        ledger=_read(path / "ledger.json", dict, unread) or {},
        plan=_read(path / "plan.json", dict, unread) or {},
        sites=_sites(path / "sites.json", unread),
        environment=_read(path / "environment.json", dict, unread) or {},
        evaluations=_evaluations(path, unread),
        hashes=_hashes(path),
        audit=_read(path / AUDIT, dict, unread) or {},
        unfinished=_unfinished(path, unread),
        quiet_seconds=max(0.0, time.time() - written.stat().st_mtime),
        unread=unread,
    )


def _summary(path: Path, unread: list[str]) -> dict[str, Any]:
    """Return summary.json, without an entry on personal adapters that no run writes."""
    found: dict[str, Any] = _read(path / "summary.json", dict, unread) or {}
    if fault := _fault_of_personal(found.get("personal")):
        unread.append(f"summary.json, personal ({fault})")
        del found["personal"]
    return found


def _fault_of_personal(personal: Any) -> str:
    """Return how `personal` of summary.json is not what a run writes; empty if it is, or absent."""
    if personal is None:
        return ""
    try:
        sites, failed = personal["sites"], personal["failed"]
        figures = [value for told in sites.values() for value in told.values()]
        texts = [personal["name"], *failed.values()]
        if personal.get("mean"):
            both = [personal[key] for key in ("mean", "spread", "worst")]
            figures += [told[name] for told in both for name in ("federated", "personal")]
            figures += [personal["better"], personal["worse"], int(personal["worst"]["site"])]
        numbers = [int(site) for site in (*sites, *failed)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"not what a run writes: {type(error).__name__} {error}"
    if not all(map(is_number, (*figures, *numbers))):
        return "not what a run writes: a figure is no number"
    if not all(isinstance(text, str) for text in texts):
        return "not what a run writes: a reason or the name is no text"
    return ""


def _config(path: Path, unread: list[str]) -> Config:
    """Return the configuration; where it cannot be read, the copy of the last state that can."""
    try:
        return recipes.resolve(recipes.load_recipe(path / "config.toml"))
    except GrandRoundsError as error:
        for state in reversed(states.folders(path)):
            with suppress(GrandRoundsError):
                found = recipes.resolve(recipes.load_recipe(state / "config.toml"))
                unread.append(
                    f"config.toml ({first_line(error)}); shown is the copy of {state.name}"
                )
                return found
        raise RunDirectoryError(
            f"{path / 'config.toml'} is not a configuration of this version: {error}"
        ) from error


def _metrics(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl up to one that cannot be read, or more from a state."""
    file = path / "metrics.jsonl"
    lines, fault = _intact_lines(file) if file.is_file() else ([], "missing")
    shown = f"shown are the {counted(len(lines), 'line')} before it"
    for state in reversed(states.folders(path)):
        kept, _ = _intact_lines(state / "metrics.jsonl")
        if fault and len(kept) > len(lines):
            lines, shown = kept, f"shown is the copy of {state.name}"
    if fault and (lines or file.is_file()):
        unread.append(f"metrics.jsonl ({fault}); {shown}")
    return lines


def _intact_lines(file: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the complete records of a file up to one that cannot be read, and why not."""
    lines: list[dict[str, Any]] = []
    try:
        for line in file.read_bytes().split(b"\n")[:-1]:
            lines += records_of(line + b"\n")
    except ValueError as error:
        return lines, f"line {len(lines) + 1}: {first_line(error).removeprefix('line 1 ')}"
    except (OSError, RecursionError) as error:
        return lines, first_line(error)
    return lines, ""


def _unfinished(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """Return the lines of unfinished.jsonl up to one that cannot be read."""
    found, faults = unfinished_of(path)
    unread += faults
    return found


def _sites(file: Path, unread: list[str]) -> list[dict[str, Any]]:
    sites = _read(file, list, unread) or []
    if all(isinstance(site, dict) and isinstance(site.get("partition-id"), int) for site in sites):
        return list(sites)
    unread.append(f"{file.name} (an entry is not a site)")
    return []


def _read(file: Path, kind: type, unread: list[str]) -> Any:
    """Return the content of a JSON file; None if there is none, or it cannot be read."""
    if not file.exists():
        return None
    name = "/".join(file.parts[-2:]) if "evaluation" in file.parts[-2:] else file.name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        unread.append(f"{name} ({first_line(error)})")
        return None
    if not isinstance(content, kind):
        unread.append(
            f"{name} (holds a {type(content).__name__}, not the {kind.__name__} of a run)"
        )
        return None
    return content


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """Return (round, folder) of the checkpoints of a run, by round."""
    found = [
        (int(folder.name.removeprefix("peft_")), folder)
        for folder in path.glob("peft_*")
        if folder.name.removeprefix("peft_").isdigit()
    ]
    return sorted(found)


def _evaluations(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """Return the evaluations of the run and of its checkpoints."""
    found = []
    for folder in (path, *(folder for _, folder in checkpoints(path))):
        content = _read(folder / EVALUATION, dict, unread)
        if content is None:
            continue
        for evaluation in content.get("evaluations") or [content]:
            if fault := _fault_of_evaluation(evaluation):
                unread.append(
                    f"{(folder / EVALUATION).relative_to(path)} ({fault}); evaluate again"
                )
            else:
                found.append(evaluation)
    return found


def _fault_of_evaluation(evaluation: Any) -> str:
    """Return how an evaluation is not what `grandrounds evaluate` writes; empty if it is."""
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"not what grandrounds evaluate writes: {type(error).__name__} {error}"
    return ""


def _hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of the configuration and of each checkpoint's weights."""
    files = [path / "config.toml"]
    files += [folder / "adapter_model.safetensors" for _, folder in checkpoints(path)]
    hashes = {}
    for file in files:
        if file.is_file():
            hashes[str(file.relative_to(path))] = sha256_of(file)
    return hashes
