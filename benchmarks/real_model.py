"""A real language model on real data: what federated tuning gains, and what it costs.

    grandrounds base fetch smollm2-135m-instruct
    python benchmarks/real_model.py real_model.jsonl --data ../shared/data --folder real-model
    python benchmarks/real_model.py real_model.jsonl --table

`--data` is a folder with `train/wikidoc_patient_information.jsonl.gz` (columns `input`, `output`)
and `eval/` with medmcqa and pubmedqa. Parts:

    wikidoc     held-out loss of the base, the federation, training on the pooled data and each site
                alone: 20 sites, 3 a round, 6 steps of 16, 256 tokens, LoRA r = 16 on q_proj, v_proj
    benchmarks  MedMCQA and PubMedQA by likelihood, base and federated model of the first seed. A
                model of 135 M parameters is expected at chance (25 % and the largest class)
    formulary   the private facts of twenty sites taught to the same base
    forgetting  the same benchmarks and WikiDoc's held-out loss after the formulary

Hours on a CPU; a GPU is taken where there is one. Every finished cell is a line of the file; the
same command continues, and `--seconds` limits it. `--jobs N` plays N cells at a time, each in a
process with a base of its own. Tables: benchmarks/real_model_table.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from real_model_cells import ARMS, PARTS, Cell, Desk, Setup, cells, machine_of
from real_model_table import show

from grandrounds.cli.screen import say
from grandrounds.config.bases import REAL_BASE, find_base
from grandrounds.quiet import quiet_libraries


def work(desk: Desk, pipe: Connection) -> None:
    """Play the cells that come through a pipe, until it is closed."""
    quiet_libraries()
    while True:
        try:
            cell: Cell = pipe.recv()
        except EOFError:
            return
        started = time.perf_counter()
        try:
            result = desk.play(cell)
            pipe.send({"result": result, "seconds": time.perf_counter() - started})
        except Exception:  # told by the process that reads the pipe, which goes on
            pipe.send({"error": traceback.format_exc()})
            continue
        pipe.send(machine_of(desk))


class Workers:
    """Processes that play cells, and the file that takes their lines."""

    def __init__(self, desk: Desk, file: Path, jobs: int) -> None:
        self._desk, self._file, self._jobs = desk, file, jobs
        self._processes: dict[Connection, Any] = {}
        self._busy: dict[Connection, Cell] = {}
        self.failed: list[Cell] = []

    def play(self, todo: list[Cell], done: set[Cell], ends: float) -> list[Cell]:
        """Play cells until a time; return those that were interrupted, without the failed ones."""
        try:
            while time.monotonic() < ends:
                while len(self._busy) < self._jobs and (cell := self._next(todo, done)):
                    todo.remove(cell)
                    self._give(cell)
                if not self._busy:
                    break
                left = min(ends - time.monotonic(), 3600)
                for pipe in wait(list(self._busy), timeout=max(left, 0)):
                    self._take(pipe, done)  # type: ignore[arg-type]
            return list(self._busy.values())
        finally:
            for process in self._processes.values():
                process.terminate()
                process.join()

    def _next(self, todo: list[Cell], done: set[Cell]) -> Cell | None:
        ready = (c for c in todo if c.needs is None or c.needs in done)
        return next(ready, None)

    def _give(self, cell: Cell) -> None:
        idle = [pipe for pipe in self._processes if pipe not in self._busy]
        pipe = idle[0] if idle else self._start()
        pipe.send(cell)
        self._busy[pipe] = cell

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(self._desk, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def _take(self, pipe: Connection, done: set[Cell]) -> None:
        """Write down a finished cell, or say why there is none."""
        cell = self._busy.pop(pipe)
        try:
            told = pipe.recv()
            machine = None if "error" in told else pipe.recv()
        except EOFError:
            process = self._processes.pop(pipe)
            process.join()
            told = {"error": f"its process ended with status {process.exitcode}"}
        if "error" in told:
            self.failed.append(cell)
            say(f"failed: {cell.name}", told["error"].rstrip())
            return
        line = {
            "cell": dataclasses.asdict(cell),
            **told,
            "machine": {**machine, "jobs": self._jobs},
        }
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        done.add(cell)
        say(f"done: {cell.name}, {told['seconds']:,.1f} s")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the file; one that was cut off by a kill is left out."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            say(f"left out: a damaged line of {file}")


def begin(file: Path, setup: Setup) -> set[Cell]:
    """Return the finished cells of the file, which is begun if it is new."""
    before = list(read(file))
    own = json.loads(json.dumps(dataclasses.asdict(setup)))
    if not before:
        file.write_text(json.dumps({"setup": own}) + "\n")
    elif before[0]["setup"] != own:
        sys.exit(f"{file} was begun with {before[0]['setup']}, not {own}: choose another file.")
    return {Cell(**line["cell"]) for line in before if "cell" in line}


def main() -> None:
    """Play what is missing, write a line for each cell, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="one JSON line for each finished cell")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("real-model"), help="runs in progress")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--model", default=REAL_BASE)
    parser.add_argument("--dtype", default="auto", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--template", default="chat", help="prompt template of the training")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--formulary-rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--limit", type=int, default=300, help="items of each benchmark")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    parser.add_argument("--table", action="store_true", help="only print the tables of the file")
    given = parser.parse_args()
    ends = time.monotonic() + given.seconds
    failed: list[Cell] = []
    if not given.table:
        failed = play(given, ends)

    show(list(read(given.file)))
    sys.exit(1 if failed else 0)


def play(given: argparse.Namespace, ends: float) -> list[Cell]:
    """Play what is missing and say what is still missing then; return what failed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.jobs > 1:  # before a process loads torch
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.jobs)))
    find_base(given.model)
    fields = [field.name for field in dataclasses.fields(Setup)]
    named = {**vars(given), "seeds": tuple(given.seeds)}
    setup = Setup(**{name: named[name] for name in fields})
    desk = Desk(setup, given.data.absolute(), given.folder.absolute())
    done = begin(given.file, setup)
    todo = [cell for cell in cells(setup, given.parts, given.arms) if cell not in done]
    # The adapter of a finished federation may lie on another machine.
    lost = {c.needs for c in todo if c.needs in done and not desk.run(c.needs).is_dir()}
    done, todo = done - lost, [*lost, *todo]
    say(f"{len(todo)} cells to play, {len(done)} finished before")
    workers = Workers(desk, given.file, given.jobs)
    interrupted = workers.play(todo, done, ends)
    for label, left in (
        ("failed", workers.failed),
        ("interrupted", interrupted),
        ("missing", todo),
    ):
        if left:
            say(f"{label}: {'; '.join(cell.name for cell in left)}")
    if interrupted or todo:
        say("the same command continues")
    return workers.failed


if __name__ == "__main__":
    main()
