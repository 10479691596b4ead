"""The files of a run directory that a resume reads: the state, and what beside it must agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import differences, load_recipe, resolve
from grandrounds.config.schedules import same_until
from grandrounds.config.values import Scalar
from grandrounds.config.words import command
from grandrounds.errors import ConfigError, RunDirectoryError, first_line
from grandrounds.server import states
from grandrounds.server.directory import SUMMARY, RunDirectory, records_of
from grandrounds.server.states import CONFIG, METRICS, SITES, SavedState
from grandrounds.storage import read_toml
from grandrounds.wire.told import SAME_IN_A_RUN

LEDGER = "ledger.json"

RESTORE = "Restore it from a copy, or start a new run."


# --- The state ------------------------------------------------------------------------------------


def newest(path: Path) -> tuple[SavedState | None, Sequence[str]]:
    """Return the last state, or the one before it where that is damaged, and what is told of it.

    Raises
    ------
    RunDirectoryError
        If both are damaged, or the only one.
    """
    _require_own_folder(path)
    faults: list[str] = []
    for folder in reversed(states.folders(path)[-states.WHOLE :]):
        try:
            saved = states.read(folder)
        except RunDirectoryError as error:
            faults.append(str(error))
        else:
            return saved, [
                f"{fault}: the run continues after round {saved.round}, and what was written "
                "later is kept in aside-<n>"
                for fault in faults
            ]
    if not faults:
        return None, ()
    older = states.rounds(path)[: -states.WHOLE]
    raise RunDirectoryError(f"{'; '.join(faults)}. {_instead(path, older)}")


def state_at(path: Path, number: int) -> SavedState:
    """Return the state of a round; raise `RunDirectoryError` that lists the others if it is not."""
    _require_own_folder(path)
    kept = states.rounds(path)
    others = [r for r in kept if r != number]
    if number not in kept:
        raise RunDirectoryError(
            f"{path} keeps no state after round {number}. {_instead(path, others)}"
        )
    try:
        return states.read(path / states.FOLDER / f"round-{number:06d}")
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{error}. {_instead(path, others)}") from None


def _instead(path: Path, others: Sequence[int]) -> str:
    """Return what to do where a state cannot be used."""
    if others:
        listed = ", ".join(map(str, others))
        last = command("grandrounds", "run", "--resume", path, "--from-round", others[-1])
        return f"States are kept after rounds {listed}: {last} continues from the last of them."
    return f"Restore {path / states.FOLDER} from a copy, or start a new run.{_adapters(path)}"


def _adapters(path: Path) -> str:
    saved = [folder.name for folder in states.checkpoints(path)]
    if not saved:
        return ""
    return f" The checkpoints ({', '.join(saved)}) can still be used; no run continues from them."


def _require_own_folder(path: Path) -> None:
    folder = path / states.FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise RunDirectoryError(
            f"{folder} is {what}, not the folder that a run writes. Put that back in its place."
        )


def require_unstarted(path: Path) -> None:
    """Raise `RunDirectoryError` if a run without a state has played a round."""
    file = path / METRICS
    if (file.is_file() and file.stat().st_size) or states.checkpoints(path):
        raise RunDirectoryError(
            f"{path / states.FOLDER} is missing or empty, though the run has finished rounds: it "
            f"would start again at round 1. Restore it from a copy, or start a new run."
            f"{_adapters(path)}"
        )


# --- The files beside it --------------------------------------------------------------------------


def started_with(path: Path) -> dict[str, Scalar]:
    """Return the configuration that a run was started with, as config.toml has it.

    Raises
    ------
    ConfigError
        If config.toml is damaged. The message names a copy, where a state has one.
    """
    require_own(path, CONFIG, _copy_of_config(path))
    try:
        return load_recipe(path / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{first_line(error, None)}. {_copy_of_config(path)}") from error


def require_own(path: Path, name: str, advice: str) -> None:
    """Raise `RunDirectoryError` if a folder or a link lies in the place of a run's file."""
    file = path / name
    if file.is_symlink() or file.is_dir():
        what = "link" if file.is_symlink() else "folder"
        raise RunDirectoryError(f"{file} is a {what}, not a file of the run. {advice}")


def _restore_by(copy: Path, path: Path) -> str:
    return f"Restore it: {command('cp', copy, path / CONFIG)}"


def _copy_of_config(path: Path) -> str:
    for folder in reversed(states.folders(path)):
        if (folder / CONFIG).is_file():
            return _restore_by(folder / CONFIG, path)
    return "Restore it from a copy."


def kept_recipe(path: Path, saved: SavedState | None) -> Config:
    """Return the configuration of a run; raise `RunDirectoryError` if its file was changed.

    The length may be another than when the state was saved: a resume changes it.
    """
    now = resolve(started_with(path))
    if saved is None or not saved.copies:
        return now
    copy = saved.folder / CONFIG
    if read_toml(copy) == read_toml(path / CONFIG):
        return now
    before = with_length(resolve(load_recipe(copy)), now, saved.round)
    if changes := differences(before, now):
        raise RunDirectoryError(
            f"{path / CONFIG} was changed since the run started: {'; '.join(changes)}. "
            f"{_restore_by(copy, path)}"
        )
    return now


def kept_records(path: Path, saved: SavedState) -> tuple[list[states.Record], list[str], bool]:
    """Return the lines of metrics.jsonl up to a state, what was wrong, and if there were more."""
    file, number = path / METRICS, saved.round
    there, fault = [], ""
    try:
        there = RunDirectory(path).read_metrics()
    except RunDirectoryError:
        fault = "was damaged"
    if saved.copies:
        kept: list[states.Record] = list(records_of(saved.copies[METRICS]))
    else:  # of an earlier version
        if fault or [m["round"] for m in there[:number]] != list(range(number)):
            raise RunDirectoryError(
                f"{file} lacks lines of rounds before {number}, or is damaged; this run is of an "
                f"earlier version, whose states have no copy of it. {RESTORE}"
            )
        kept = [*there[:number], saved.data["record"]]
    own, beyond = there[: len(kept)], there[len(kept) :]
    # a kill may leave the file without the last line
    if not fault and json.dumps(own) not in (json.dumps(kept), json.dumps(kept[:-1])):
        fault = "was not as the run wrote it" if file.exists() else "was missing"
    said = []
    if fault:
        said.append(f"{file} {fault}; it is written anew from the state after round {number}")
    elif beyond and not any(later > number for later in states.rounds(path)):
        said.append(
            f"{file} had lines beyond round {number}, whose states are missing: the run continues "
            "after that round, and what was written later is kept in aside-<n>"
        )
    return kept, said, bool(beyond)


def kept_sites(path: Path, saved: SavedState) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the introductions of the sites, and what was wrong with sites.json."""
    file = path / SITES
    try:
        there = RunDirectory(path).read_json(SITES)
        fault = "" if _is_list_of_sites(there) else "was damaged"
        if not file.is_file():
            fault = "was missing"
    except RunDirectoryError:
        there, fault = None, "was damaged"
    if not saved.copies:
        if fault:
            raise RunDirectoryError(f"{file} {fault}. {RESTORE}")
        return list(there or ()), []
    kept = json.loads(saved.copies[SITES])
    if not fault and not _agree(kept, there):
        fault = "was not as the run wrote it"
    note = f"{file} {fault}; it is written anew from the state after round {saved.round}"
    return kept, [note] if fault else []


def _agree(kept: Sequence[dict[str, Any]], there: Sequence[dict[str, Any]]) -> bool:
    """Return whether sites.json has the sites of a state, with what must not change in a run.

    A roll call after the state may add sites, and what they tell of their machines.
    """
    now = {site["partition-id"]: site for site in there}
    return all(
        (site["partition-id"] in now)
        and all(site.get(fact) == now[site["partition-id"]].get(fact) for fact in SAME_IN_A_RUN)
        for site in kept
    )


def _is_list_of_sites(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(site, dict) and isinstance(site.get("partition-id"), int) for site in found
    )


def kept_summary(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return summary.json, empty if there is none or it is damaged, which is told."""
    try:
        found = RunDirectory(path).read_json(SUMMARY)
    except RunDirectoryError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("rounds"), int):
        return found, []
    is_there = (path / SUMMARY).is_file()
    return {}, [f"{path / SUMMARY} was damaged; it is written anew"] * is_there


def about_ledger(path: Path) -> list[str]:
    """Return what is wrong with ledger.json, which is written anew from the state."""
    try:
        found = RunDirectory(path).read_json(LEDGER)
    except RunDirectoryError:
        found = None
    is_damaged = (path / LEDGER).is_file() and not (isinstance(found, dict) and "totals" in found)
    return [f"{path / LEDGER} was damaged; it is written anew"] * is_damaged


def with_length(before: Config, now: Config, played: int) -> Config:
    """Return a configuration with another's length, if the rounds played have the same schedule."""
    one, other = before.federation, now.federation
    if not same_until(one.length, other.length, played):
        return before
    length = dataclasses.replace(
        one,
        num_server_rounds=other.num_server_rounds,
        earlier_schedules=other.earlier_schedules,
    )
    return dataclasses.replace(before, federation=length)
