"""How a run is resumed: from which state, what of its directory is mended, and what is refused.

A resume reads the state, which holds copies of what else it needs (`server/states.py`). The files
that a run keeps in its directory for its readers are then made to agree with that state, and what
did not agree is told. Nothing is written before all has been read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import differences, load_recipe, resolve, to_toml
from grandrounds.config.schedules import lengthened, same_until
from grandrounds.config.values import Scalar
from grandrounds.config.words import command, counted
from grandrounds.errors import ConfigError, RunDirectoryError, first_line
from grandrounds.server import states
from grandrounds.server.described import are_real
from grandrounds.server.directory import SUMMARY, RunDirectory, records_of
from grandrounds.server.states import CONFIG, METRICS, SITES, SavedState
from grandrounds.server.unfinished import AFTER, UNFINISHED, unfinished_of
from grandrounds.storage import read_toml

if TYPE_CHECKING:
    from grandrounds.server.run import State

LEDGER = "ledger.json"

WRITTEN = (METRICS, SITES, LEDGER, UNFINISHED, SUMMARY, "plan.json", "environment.json")
"""Files of a run directory that a resume writes anew."""

RESTORE = "Restore it from a copy, or start a new run."


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from."""

    saved: SavedState
    """The state."""
    state: State
    """The same as the run holds it."""
    records: Sequence[states.Record]
    """The lines of metrics.jsonl up to its round."""
    sites: Sequence[dict[str, Any]]
    """The content of sites.json."""
    unfinished: Sequence[Mapping[str, Any]]
    """The lines of unfinished.jsonl that still count."""
    recipe: bytes
    """The content of config.toml: with the length that the run now has."""
    notes: Sequence[str]
    """What was damaged and is mended, one sentence each."""
    has_later: bool
    """Whether the run finished rounds after it, which are set aside."""
    has_new_length: bool
    """Whether the run goes on with another number of rounds than config.toml names."""
    was_complete: bool
    """Whether the run had come to its end."""


def check(
    config: Config, from_round: int | None = None, *, patience_seconds: float = 0.0
) -> list[str]:
    """Check that the run of `resume-from` can be resumed; return what is damaged and mended.

    Parameters
    ----------
    patience_seconds : float
        How long a process that still writes the run is waited for.

    Raises
    ------
    RunDirectoryError
        As `examine`, and if another process is writing the run.
    """
    directory = RunDirectory.open(Path(config.federation.resume_from))
    directory.hold(patience_seconds)
    try:
        found = examine(directory, config, from_round)
        checkpoints = states.damaged_checkpoints(directory.path)
    finally:
        directory.release()
    return [
        *(found.notes if found else ()),
        *(f"{said}; do not use that checkpoint" for said in checkpoints),
    ]


def continued(
    config: Config, from_round: int | None = None, *, patience_seconds: float = 0.0
) -> Config:
    """Return the configuration with which the run of `resume-from` goes on.

    Where that gives the run another length, `earlier-schedules` says which schedule the rounds that
    it has played followed.

    Parameters
    ----------
    patience_seconds : float
        How long a process that still writes the run is waited for, if any.

    Raises
    ------
    RunDirectoryError
        If both of the last two states are damaged, or another process is writing the run.
    """
    directory, asked = RunDirectory.open(Path(config.federation.resume_from)), config.federation
    path = directory.path
    if patience_seconds:
        directory.hold(patience_seconds)
        directory.release()
    run = resolve(started_with(path))
    earlier, before = run.federation.length
    if asked.earlier_schedules not in ("", earlier):
        return config
    if asked.num_server_rounds != before and not run.is_private:
        saved = None if from_round is not None else newest(path)[0]
        played = min(from_round or (saved.round if saved else 0), before)
        earlier = lengthened(earlier, before, played, asked.num_server_rounds)
    return dataclasses.replace(
        config, federation=dataclasses.replace(asked, earlier_schedules=earlier)
    )


def examine(
    directory: RunDirectory, config: Config, from_round: int | None = None
) -> Resumption | None:
    """Read what a run is resumed from; None if it was stopped before anything was measured.

    Parameters
    ----------
    from_round : int, optional
        The round to continue after; None is the last one that is intact, of the last two.

    Raises
    ------
    RunDirectoryError
        If the run is completed and not given more rounds, its configuration differs otherwise, it
        would go back behind sums that real sites have masked, or what a resume needs is damaged.
    """
    path, rounds = directory.path, config.federation.num_server_rounds
    for name in WRITTEN:
        _require_own(path, name, "Move it away; the run writes the file anew.")
    summary, notes = _summary(path)
    recorded = resolve(started_with(path))
    before = recorded.federation.num_server_rounds
    was_complete = summary.get("status") == "completed" and summary["rounds"] >= before
    if was_complete and from_round is None and rounds == before:
        raise RunDirectoryError(_nothing_left(path, config, summary["rounds"]))
    if recorded.is_private and rounds != before:
        raise RunDirectoryError(f"{path} has {before} rounds, and not {rounds}. {_PRIVATE}")
    saved, lost = newest(path) if from_round is None else (_at(path, from_round), ())
    played = saved.round if saved else 0
    if played >= rounds != before:
        raise RunDirectoryError(
            f"{path} has played {counted(played, 'round')} of {before}, so that it cannot go on to "
            f"{rounds}: give at least --rounds {played + 1}, or with --from-round an earlier round."
        )
    if changes := differences(_with_length(_recipe(path, saved), config, played), config):
        raise RunDirectoryError(
            f"{path} was started with another configuration: {'; '.join(changes)}. "
            "Resume without these changes, or start a new run with them."
        )
    if saved is None:
        _require_unstarted(path)
        return None
    from grandrounds.server.run import State  # loads torch, which a refusal need not

    try:
        state = State.from_json(saved.adapter, saved.data)
        records, about_metrics, beyond = _records(path, saved)
        sites, about_sites = _sites(path, saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunDirectoryError(
            f"{saved.folder} is not what a run writes ({type(error).__name__}: "
            f"{first_line(error)}). {RESTORE}"
        ) from error
    has_new_length = recorded.federation.length != config.federation.length
    file = saved.folder / CONFIG if saved.copies else path / CONFIG
    content = file.read_bytes()
    if resolve(load_recipe(file)).federation.length != config.federation.length:
        content = to_toml(config.recipe()).encode()
    later = beyond or any(number > saved.round for number in states.rounds(path))
    if later and from_round is not None and recorded.is_masked and are_real(sites):
        raise RunDirectoryError(
            f"{path} cannot go back to round {from_round}: its updates are masked, and its sites "
            "have answered for the one sum of each later round. Start a new run, with "
            "--from-adapter from one of its checkpoints."
        )
    unfinished, about_unfinished = unfinished_of(path, saved.round + (not later))
    state.count_on(line for line in unfinished if line[AFTER] == saved.round)
    told = [*lost, *about_metrics, *about_sites, *notes, *_ledger(path), *about_unfinished]
    return Resumption(
        saved=saved,
        state=state,
        records=records,
        sites=sites,
        unfinished=unfinished,
        recipe=content,
        notes=told,
        has_later=later,
        has_new_length=has_new_length,
        was_complete=was_complete,
    )


def _nothing_left(path: Path, config: Config, rounds: int) -> str:
    """Return why a completed run is not resumed, and what trains longer."""
    done = f"{path} is a completed run of {counted(rounds, 'round')}; there is nothing to resume."
    if config.is_private:
        return f"{done} {_PRIVATE}"
    longer = command("grandrounds", "run", "--resume", path, "--rounds", 2 * rounds)
    return f"{done} To train longer: {longer}"


_PRIVATE = (
    "The noise of a private run is calibrated for its rounds, and its sites have reserved no more: "
    "start a new run of as many rounds as are wanted."
)


def _with_length(before: Config, now: Config, played: int) -> Config:
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


def restore(directory: RunDirectory, found: Resumption) -> None:
    """Make the directory what it was after the resumed round.

    Finished rounds after it are set aside. The checkpoint of a round that was not finished is
    removed.
    """
    if found.has_later:
        directory.set_aside_after(found.saved.round)
    directory.remove_after(found.saved.round)
    if found.has_new_length:
        directory.write_recipe(found.recipe)
    directory.restore(found.recipe, found.records)
    directory.write_unfinished(found.unfinished)
    if found.saved.copies:
        directory.write_json(SITES, list(found.sites))
    directory.write_json(LEDGER, found.state.ledger.as_dict())
    if found.was_complete and not found.has_later:
        directory.keep_summary(found.saved.round)
    directory.remove(SUMMARY)


def prepare(config: Config, from_round: int | None = None) -> None:
    """Make the directory of `resume-from` ready for an engine that finds it as it is.

    With a round, that one becomes the last of the run; later ones are set aside.
    """
    directory = RunDirectory.open(Path(config.federation.resume_from))
    directory.hold()
    try:
        if found := examine(directory, config, from_round):
            restore(directory, found)
    finally:
        directory.release()


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


def _at(path: Path, number: int) -> SavedState:
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


def _require_unstarted(path: Path) -> None:
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
    _require_own(path, CONFIG, _copy_of_config(path))
    try:
        return load_recipe(path / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{first_line(error, None)}. {_copy_of_config(path)}") from error


def _require_own(path: Path, name: str, advice: str) -> None:
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


def _recipe(path: Path, saved: SavedState | None) -> Config:
    """Return the configuration of a run; raise `RunDirectoryError` if its file was changed.

    The length may be another than when the state was saved: a resume changes it.
    """
    now = resolve(started_with(path))
    if saved is None or not saved.copies:
        return now
    copy = saved.folder / CONFIG
    if read_toml(copy) == read_toml(path / CONFIG):
        return now
    before = _with_length(resolve(load_recipe(copy)), now, saved.round)
    if changes := differences(before, now):
        raise RunDirectoryError(
            f"{path / CONFIG} was changed since the run started: {'; '.join(changes)}. "
            f"{_restore_by(copy, path)}"
        )
    return now


def _records(path: Path, saved: SavedState) -> tuple[list[states.Record], list[str], bool]:
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


def _sites(path: Path, saved: SavedState) -> tuple[list[dict[str, Any]], list[str]]:
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
    from grandrounds.server.introductions import SAME_IN_A_RUN

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


def _summary(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return summary.json, empty if there is none or it is damaged, which is told."""
    try:
        found = RunDirectory(path).read_json(SUMMARY)
    except RunDirectoryError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("rounds"), int):
        return found, []
    is_there = (path / SUMMARY).is_file()
    return {}, [f"{path / SUMMARY} was damaged; it is written anew"] * is_there


def _ledger(path: Path) -> list[str]:
    """Return what is wrong with ledger.json, which is written anew from the state."""
    try:
        found = RunDirectory(path).read_json(LEDGER)
    except RunDirectoryError:
        found = None
    is_damaged = (path / LEDGER).is_file() and not (isinstance(found, dict) and "totals" in found)
    return [f"{path / LEDGER} was damaged; it is written anew"] * is_damaged
