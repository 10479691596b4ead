"""Runs the arms of the rehearsal, each as the product runs in process, and examines them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config.values import Scalar
from grandrounds.data.common_and_rare.records import rows
from grandrounds.study.demonstration.arms import ARMS, RECIPE, Arm
from grandrounds.study.demonstration.exam import Answers, Examiner, knowledge


@dataclass(frozen=True)
class Task:
    """One arm on one draw of the rare patients; without an arm, the exam of the base."""

    arm: Arm | None
    draw: int = 0
    """Draw of the rare patients, and seed of the run; the noise has no seed."""
    changes: Mapping[str, Scalar] = field(default_factory=dict)
    """Keys that replace those of the recipe."""


@dataclass(frozen=True)
class Played:
    """What became of a task."""

    task: Task
    answers: Answers
    guarantee: Mapping[str, Any]
    """What the site told at the roll call; empty without a guarantee."""
    seconds: float


def played(task: Task) -> Played:
    """Run one arm and examine it; only in a process that trains nothing else meanwhile."""
    from grandrounds import client_app, server_app
    from grandrounds.config import recipes
    from grandrounds.engines.in_process import InProcessGrid
    from grandrounds.model import machine
    from grandrounds.model.resident import set_adapter
    from grandrounds.model.saved import read_adapter
    from grandrounds.model.tokenizers import run_tokenizer
    from grandrounds.quiet import quiet_libraries
    from grandrounds.server.listeners import Listener
    from grandrounds.wire.guarantee import GUARANTEE

    quiet_libraries()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="grandrounds-demo-") as name:
        folder = Path(name)
        settings: dict[str, Scalar] = {**RECIPE, "seed": task.draw, **task.changes}
        settings |= {"run-directory": str(folder / "run")} | (task.arm.settings if task.arm else {})
        if task.draw:
            settings["static.dataset.name"] = str(write_draw(folder, task.draw))
        config = recipes.resolve(settings)
        resident = machine.prepare_model(config)
        examiner = Examiner(resident.model, run_tokenizer(config), config.data.prompt)
        if task.arm is None:
            with resident.model.disable_adapter():
                answers = examiner.answers(task.draw)
            return Played(task, answers, {}, time.perf_counter() - started)
        grid = InProcessGrid(client_app.app, config.flat(), config.data.num_partitions)
        summary = server_app.federate(grid, config, Listener())
        [site, *_] = json.loads((folder / "run" / "sites.json").read_text())
        set_adapter(resident, read_adapter(folder / "run" / summary["adapter"]))
        answers = examiner.answers(task.draw)
    told = {name: site[name] for name in GUARANTEE if name in site}
    return Played(task, answers, told, time.perf_counter() - started)


def write_draw(folder: Path, draw: int) -> Path:
    """Write the records of one draw as JSON lines; return the file."""
    file = folder / "records.jsonl"
    storage.write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows(draw)))
    return file


def demonstrate(
    draw: int,
    jobs: int,
    tell: Callable[[str], None],
    arms: Sequence[Arm] = ARMS,
    changes: Mapping[str, Scalar] | None = None,
) -> list[dict[str, Any]]:
    """Run the arms on one draw of the rare patients; return what each measured, as JSON values.

    Parameters
    ----------
    jobs : int
        Processes; 1: this one.
    tell
        Called with a line when an arm is done.
    changes
        Keys that replace those of the recipe.
    """
    tasks = [Task(arm, draw, changes or {}) for arm in (None, *arms)]
    done: dict[Arm | None, Played] = {}
    for one in _played_all(tasks, jobs):
        done[one.task.arm] = one
        what = f"epsilon {one.task.arm.name}" if one.task.arm else "the base's exam"
        tell(f"{what}: {one.seconds:.0f} s")
    base = done[None].answers
    return [_findings(done[arm], base) for arm in arms]


def _played_all(tasks: Sequence[Task], jobs: int) -> Any:
    """Yield what became of each task as it ends."""
    if jobs == 1:
        yield from map(played, tasks)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(played, task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _findings(one: Played, base: Answers) -> dict[str, Any]:
    return {
        "arm": one.task.arm.name if one.task.arm else "base",
        "draw": one.task.draw,
        "epsilon": one.guarantee.get("reserved-epsilon"),
        "guarantee": dict(one.guarantee),
        **knowledge(one.answers, base),
        "seconds": one.seconds,
    }
