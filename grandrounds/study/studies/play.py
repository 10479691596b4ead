"""Plays the missing cells of a study, in this process or in several."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grandrounds import client_app, storage
from grandrounds.errors import GrandRoundsError, RunDirectoryError
from grandrounds.model.tokenizers import dated
from grandrounds.quiet import quiet_libraries
from grandrounds.server.directory import environment
from grandrounds.server.listeners import Listener
from grandrounds.study.comparison import runner
from grandrounds.study.comparison.arms import completed
from grandrounds.study.comparison.folder import day_in
from grandrounds.study.comparison.units import Design
from grandrounds.study.studies import figures
from grandrounds.study.studies.cells import Cell, Line, Lines, compared
from grandrounds.study.studies.file import RUN

Found = dict[str, Any]
Tell = Callable[[str, Mapping[str, Any]], None]
"""Called with an event (begun, played, failed) and its data."""


def play(
    cells: Sequence[Cell],
    folder: Path,
    jobs: int = 1,
    seconds: float | None = None,
    tell: Tell = lambda *_: None,
) -> list[Cell]:
    """Play the cells that have no line yet; return those that are still missing.

    A cell that a kill has interrupted goes on from its last checkpoint. Cells of one recipe and
    seed share a folder and are played in turn.

    Parameters
    ----------
    jobs : int
        Processes that play at the same time; with one it is this process.
    seconds : float, optional
        No cell begins later than so many seconds from now.

    Raises
    ------
    RunDirectoryError
        If cells.jsonl is damaged, another process plays this study, or nothing can be written.
    """
    with _locked(folder):
        lines = Lines(folder)
        missing = [cell for cell in cells if lines.of(cell) is None]
        groups: dict[str, list[Cell]] = {}
        for cell in missing:
            groups.setdefault(cell.place, []).append(cell)
        queue = list(groups.values())
        until = None if seconds is None else time.monotonic() + seconds
        waiting = _while_time(queue, until)
        several = jobs > 1 and len(queue) > 1
        played = (
            _in_processes(waiting, folder, min(jobs, len(queue)), tell)
            if several
            else (_here(waiting, folder, tell))
        )
        for line in played:
            lines.append(line)
            tell("played", line)
        return [cell for cell in missing if lines.of(cell) is None]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    advice = "Free some space, or give another folder with --out."
    with storage.writing(f"The study directory {folder}", advice, RunDirectoryError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunDirectoryError(
            f"{folder} is being played by another process. Wait for it, or give another --out."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"{lock.lock_file} cannot be locked: {error.strerror}. Move it away, or give another "
            "--out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _while_time(queue: Sequence[list[Cell]], until: float | None) -> Iterator[list[Cell]]:
    for group in queue:
        if until is not None and time.monotonic() >= until:
            return
        yield group


def _here(queue: Iterator[list[Cell]], folder: Path, tell: Tell) -> Iterator[Line]:
    for group in queue:
        tell("begun", {"cells": [cell.name for cell in group]})
        try:
            yield from play_group(group, folder)
        except GrandRoundsError as error:
            tell("failed", {"cells": [cell.name for cell in group], "error": str(error)})


def play_group(group: Sequence[Cell], folder: Path) -> list[Line]:
    """Play the cells of one folder, a run or the arms of a comparison; return their lines."""
    quiet_libraries()
    first = group[0]
    path = folder / first.place
    if first.arm == RUN:
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = path / "config.toml"
        config = dated(first.config, day_in(path) if recipe.is_file() else "")
        completed(config, config, client_app.app, path, Listener())
        return [_line(first, figures.of_run(path))]
    asked = compared(first.recipe)
    config = dated(first.config, day_in(path))
    design = Design(asked, [first.seed], equal_visits=first.recipe.equal_visits)
    content = runner.compare(config, design, path)
    return [_line(cell, figures.of_arm(path, content, cell.arm, cell.seed)) for cell in group]


def _line(cell: Cell, found: Mapping[str, Any]) -> Line:
    told = environment()
    return {
        "cell": cell.name,
        "recipe": cell.recipe.name,
        "arm": cell.arm,
        "seed": cell.seed,
        "hash": cell.hash,
        "set": cell.set(),
        **found,
        "versions": {"grandrounds": told["grandrounds"], **told["packages"]},
        "cpu": told["cpu"],
        "place": cell.place,
        "command": cell.command(),
    }


# --- Several processes ----------------------------------------------------------------------------


def _in_processes(
    queue: Iterator[list[Cell]], folder: Path, jobs: int, tell: Tell
) -> Iterator[Line]:
    """Yield lines as processes finish them; each takes its next group when it has sent the last."""
    context = get_context("spawn")
    workers: dict[Any, tuple[Any, list[Cell]]] = {}

    def give(pipe: Any, process: Any) -> None:
        group = next(queue, None)
        pipe.send(group)
        if group is None:
            workers.pop(pipe, None)
            return
        workers[pipe] = (process, group)
        tell("begun", {"cells": [cell.name for cell in group]})

    processes = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder, os.getpid()), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            give(ours, process)
        while workers:
            ready: list[Any] = list(connection.wait(list(workers)))
            for pipe in ready:
                process, group = workers[pipe]
                names = [cell.name for cell in group]
                try:
                    made = pipe.recv()
                except EOFError:  # the system has ended it
                    process.join()
                    workers.pop(pipe)
                    said = f"its process has ended with code {process.exitcode}"
                    tell("failed", {"cells": names, "error": said})
                    continue
                if isinstance(made, str):
                    tell("failed", {"cells": names, "error": made})
                else:
                    yield from made
                give(pipe, process)
    finally:
        for process in processes:
            if process.is_alive() and workers:
                process.terminate()
            process.join()


def _work(pipe: Any, folder: Path, parent: int) -> None:
    """Play the groups that come through a pipe; an empty one ends the process."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while (group := pipe.recv()) is not None:
        try:
            pipe.send(play_group(group, folder))
        except GrandRoundsError as error:
            pipe.send(str(error))


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed: the next command plays the same folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
