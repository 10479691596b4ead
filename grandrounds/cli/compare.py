"""`grandrounds compare`: federated beside centralised, local and leave-one-out.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from grandrounds.cli.options import Assignments, ConfigFile, Data, Model, Rounds
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.keys import PLACES
from grandrounds.config.values import words_of
from grandrounds.errors import ConfigError
from grandrounds.quiet import quiet_libraries
from grandrounds.study.comparison import units as comparison

DEFAULT_ARMS = "federated,centralised,local"


def compare(
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    data: Data = None,
    rounds: Rounds = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Some of federated, centralised, local, leave-one-out, with commas.",
            metavar="NAMES",
        ),
    ] = DEFAULT_ARMS,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds: the configuration's, and those after it.")
    ] = 1,
    sites: Annotated[
        str,
        typer.Option(
            help="Sites that `leave-one-out` leaves out, each in a federation of its own: `all`, "
            "or numbers with commas."
        ),
    ] = "all",
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks to ask besides, with commas: pubmedqa, medqa, medmcqa, careqa.",
            metavar="NAMES",
        ),
    ] = None,
    benchmark_data: Annotated[
        Path | None,
        typer.Option(help="Folder with files of the benchmarks; else the hub.", metavar="DIR"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first so many items of each benchmark.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to, or to go on in; default `comparisons/<date>-<time>-<model>`.",
            metavar="DIR",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no progress bar.")] = False,
) -> None:
    """Say what the federation gained, and for whom.

    The same adapter, recipe and number of example visits in every arm; only the data differ:
    `federated` as configured, `centralised` on one pool, `local` at each site alone,
    `leave-one-out` without one site. All are judged on what each site holds out.

    Examples:

    - `grandrounds compare --set data.partitioner=natural --set data.partition-by=site --seeds 3`

    - `grandrounds compare --data flashcards.jsonl --arms federated,local --seeds 5`

    - `grandrounds compare --arms federated,leave-one-out --sites 0,3 --out comparisons/joining`
    """
    asked = comparison.check_arms(list(words_of(arms)))
    settings = recipes.from_options(config, assignments, model=model, data=data, rounds=rounds)
    for key in PLACES:
        if settings.pop(key, ""):
            raise ConfigError(f"{key} is for single runs: give the comparison's folder as --out.")
    resolved = recipes.with_absolute_paths(recipes.resolve(settings))
    numbers = comparison.check_seeds(resolved.federation.seed, seeds)
    recipes.resolve(resolved.flat(), {"seed": numbers[-1]})
    left_out = comparison.check_sites(sites, resolved.data.num_partitions)
    names = list(words_of(benchmarks or ""))
    design = comparison.Design(asked, numbers, left_out, names, benchmark_data, limit)
    quiet_libraries()
    from grandrounds.study.comparison import runner as comparison_runner
    from grandrounds.study.comparison.folder import RESULT
    from grandrounds.study.comparison.tables import notes, tables

    folder = out or comparison_runner.default_folder(resolved)
    screen = Screen(plain)
    with progress(plain) as listener:
        try:
            content = comparison_runner.compare(resolved, design, folder, listener)
        except KeyboardInterrupt:
            kept = f"finished parts are kept; the same command with --out {folder} goes on"
            raise KeyboardInterrupt(kept) from None
    for table in tables(content):
        screen.table(table.title, table.columns, table.rows)
    screen.notes(notes(content))
    screen.say(f"written: {folder}/{RESULT}")


@contextmanager
def progress(plain: bool) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Give a listener of `comparison_runner.compare`: a bar on a terminal, else a line a part."""
    console = Console()
    clock = Clock()
    if plain or not console.is_terminal:

        def tell(event: str, facts: Mapping[str, Any]) -> None:
            clock(event, facts)
            if line := _line(event, facts, clock):
                print(line, flush=True)

        yield tell
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
    )
    task = bar.add_task("reading", total=None, left="")

    def draw(event: str, facts: Mapping[str, Any]) -> None:
        clock(event, facts)
        bar.update(task, total=max(1, clock.planned), completed=clock.work, left=clock.left())
        bar.update(task, description=f"{clock.done}/{clock.units} parts")
        if line := _line(event, facts, clock):
            console.print(escape(line), highlight=False)

    with bar:
        yield draw


class Clock:
    """Counts work in example visits, and from that the time that is left."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.units = self.done = 0
        self.planned = self.work = self._finished = 0.0
        self._has_trained = False  # the base is loaded before: that tells nothing of the rest

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Take in one event."""
        if event == "planned":
            self.started = time.monotonic()
            self.units, self.done, self.planned = facts["units"], facts["kept"], facts["work"]
        elif event == "visited":
            self.work += facts["count"]
            self._has_trained = self._has_trained or facts["count"] > 0
        else:
            self.done += 1
            self._finished += facts["work"]
            self.work = self._finished  # as planned, whatever failed or was resumed

    def left(self) -> str:
        """Return `about 3 min left`; empty before there is anything to judge by."""
        if not self._has_trained or self.work >= self.planned:
            return ""
        spent = time.monotonic() - self.started
        seconds = spent * (self.planned - self.work) / self.work
        return (
            f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
        )


def _line(event: str, facts: Mapping[str, Any], clock: Clock) -> str:
    """Return what is told of an event; empty for what only moves the bar."""
    if event == "planned":
        kept = f", {facts['kept']} finished before" if facts["kept"] else ""
        return f"comparison in {facts['directory']}: {facts['units']} parts{kept}"
    if event == "visited":
        return ""
    parts = [f"{clock.done}/{clock.units}  {facts['unit']}: loss {facts['held-out-loss']:.3f}"]
    parts += [f"{name} {100 * right:.1f} %" for name, right in facts["accuracy"].items()]
    parts += [f"{facts['seconds']:.1f} s", clock.left()]
    return "  ".join(part for part in parts if part)
