"""How a run is resumed: from which state, what of its directory is mended, and what is refused.

A resume reads the state, which holds copies of what else it needs (`server/states.py`). The files
that a run keeps in its directory for its readers are then made to agree with that state, and what
did not agree is told. Nothing is written before all has been read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import differences, load_recipe, resolve, to_toml
from grandrounds.config.schedules import lengthened
from grandrounds.config.words import command, counted
from grandrounds.errors import RunDirectoryError, first_line
from grandrounds.server import states
from grandrounds.server.described import are_real
from grandrounds.server.directory import SUMMARY, RunDirectory
from grandrounds.server.packages import PACKAGES
from grandrounds.server.resumed_files import (
    LEDGER,
    RESTORE,
    about_ledger,
    kept_recipe,
    kept_records,
    kept_sites,
    kept_summary,
    newest,
    require_own,
    require_unstarted,
    started_with,
    state_at,
    with_length,
)
from grandrounds.server.states import CONFIG, METRICS, SITES, SavedState
from grandrounds.server.unfinished import AFTER, UNFINISHED, unfinished_of

if TYPE_CHECKING:
    from grandrounds.server.run import State

WRITTEN = (METRICS, SITES, LEDGER, UNFINISHED, SUMMARY, "plan.json", "environment.json", PACKAGES)
"""Files of a run directory that a resume writes anew."""


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
        require_own(path, name, "Move it away; the run writes the file anew.")
    summary, notes = kept_summary(path)
    recorded = resolve(started_with(path))
    before = recorded.federation.num_server_rounds
    was_complete = summary.get("status") == "completed" and summary["rounds"] >= before
    if was_complete and from_round is None and rounds == before:
        raise RunDirectoryError(_nothing_left(path, config, summary["rounds"]))
    if recorded.is_private and rounds != before:
        raise RunDirectoryError(f"{path} has {before} rounds, and not {rounds}. {_PRIVATE}")
    saved, lost = newest(path) if from_round is None else (state_at(path, from_round), ())
    played = saved.round if saved else 0
    if played >= rounds != before:
        raise RunDirectoryError(
            f"{path} has played {counted(played, 'round')} of {before}, so that it cannot go on to "
            f"{rounds}: give at least --rounds {played + 1}, or with --from-round an earlier round."
        )
    if changes := differences(with_length(kept_recipe(path, saved), config, played), config):
        raise RunDirectoryError(
            f"{path} was started with another configuration: {'; '.join(changes)}. "
            "Resume without these changes, or start a new run with them."
        )
    if saved is None:
        require_unstarted(path)
        return None
    from grandrounds.server.run import State  # loads torch, which a refusal need not

    try:
        state = State.from_json(saved.adapter, saved.data)
        records, about_metrics, beyond = kept_records(path, saved)
        sites, about_sites = kept_sites(path, saved)
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
    told = [*lost, *about_metrics, *about_sites, *notes, *about_ledger(path), *about_unfinished]
    if later and recorded.keeps_a_part and are_real(sites):
        told.append(
            "what the sites keep of their own stays as their later visits left it; a new run "
            "starts without it"
        )
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
