"""`grandrounds compare`: federated training against centralised, local and leave-one-out.

Nothing heavy is imported before the arguments have been validated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TaskProgressColumn, TextColumn

from grandrounds.cli.options import (
    AsJson,
    Assignments,
    BenchmarkData,
    ConfigFile,
    Data,
    FromAdapter,
    Limit,
    Model,
    Plain,
    Quiet,
    Recipe,
    Rounds,
    SitesPerRound,
    Verbose,
)
from grandrounds.cli.request import tell
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.bases import find_base
from grandrounds.config.values import words_of
from grandrounds.config.words import command
from grandrounds.quiet import quiet_libraries
from grandrounds.study.chosen import chosen_recipe
from grandrounds.study.comparison import units as comparison
from grandrounds.study.continued import with_start
from grandrounds.study.sites import names_of_sites, with_sites


def compare(
    recipe: Recipe = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    from_adapter: FromAdapter = None,
    data: Data = None,
    rounds: Rounds = None,
    num_sites: Annotated[
        int | None,
        typer.Option(
            help="Number of sites. With `data.partitioner=natural`, by default one for each value "
            "of `data.partition-by`."
        ),
    ] = None,
    sites_per_round: SitesPerRound = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Arms to train, comma-separated: federated, personal, private, centralised, "
            "local, leave-one-out; default: federated,centralised,local, with personal for a "
            "recipe with personal adapters, and federated,private for one with a guarantee.",
            metavar="NAMES",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Number of consecutive seeds, starting at the configured one.")
    ] = 1,
    sites: Annotated[
        str,
        typer.Option(
            help="Sites to leave out in `leave-one-out`, one per federation: `all`, or site "
            "numbers or names, comma-separated."
        ),
    ] = "all",
    equal_visits: Annotated[
        bool,
        typer.Option(
            "--equal-visits",
            help="Let `personal` follow a federation of fewer rounds, so that with the sites' own "
            "steps it makes no more example visits than the other arms.",
        ),
    ] = False,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Additional benchmarks, comma-separated: pubmedqa, medqa, medmcqa, careqa, "
            "general.",
            metavar="NAMES",
        ),
    ] = None,
    benchmark_data: BenchmarkData = None,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder, or one to continue; default `comparisons/<date>-<time>-<model>`.",
            metavar="DIR",
        ),
    ] = None,
    plain: Plain = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what federation gains, and for which sites.

    Adapter, recipe and number of training examples seen are the same in every arm; only the data
    differ: `federated` as configured, `centralised` on the pooled data, `local` at each site alone,
    `leave-one-out` without one site. Every arm is evaluated on each site's held-out examples.
    `personal` is a recipe with `personalisation.name`: each site's own adapter.
    `private` is a recipe with `privacy.unit-guarantee`, and all other arms the same without noise.

    Examples:

    - `grandrounds compare --set data.partitioner=natural --set data.partition-by=site --seeds 3`

    - `grandrounds compare --data flashcards.jsonl --arms federated,local --seeds 5`

    - `grandrounds compare --arms federated,leave-one-out --sites 0,3 --out comparisons/joining`
    """
    screen = Screen(plain, verbose=verbose, quiet=quiet, as_json=as_json)
    screen.working("reading the configuration")
    if arms is not None:
        comparison.check_arms(list(words_of(arms)))
    file = chosen_recipe(recipe, config)
    layers = recipes.layers_of(
        *(file, assignments),
        model=model,
        from_adapter=from_adapter,
        data=data,
        rounds=rounds,
        sites=num_sites,
    )
    layers, continued = with_start(layers)
    settings = recipes.merged(with_sites(layers, sites_per_round, may_load=True))
    resolved = recipes.with_absolute_paths(recipes.resolve(settings))
    named = comparison.default_arms(resolved) if arms is None else list(words_of(arms))
    asked = comparison.check_arms(named)
    comparison.check_recipe(asked, resolved)
    if equal_visits:
        comparison.check_equal_visits(asked)
    find_base(resolved.model.name)  # fails now if it is not fetched
    numbers = comparison.check_seeds(resolved.federation.seed, seeds)
    recipes.resolve(resolved.flat(), {"seed": numbers[-1]})
    are_named = any(not word.isdigit() for word in words_of(sites) if word != "all")
    called = names_of_sites(resolved) if are_named else None
    left_out = comparison.check_sites(sites, resolved.data.num_partitions, called)
    names = list(words_of(benchmarks or ""))
    design = comparison.Design(asked, numbers, left_out, names, benchmark_data, limit, equal_visits)
    from grandrounds.study import preflight

    warnings = preflight.check(resolved)
    tell([] if quiet else [*recipes.notes(settings, file), *continued])
    tell(warnings, "warning")
    quiet_libraries()
    screen.working("importing the libraries")
    from grandrounds.model.tokenizers import dated
    from grandrounds.study.comparison import runner as comparison_runner
    from grandrounds.study.comparison.folder import RESULT, day_in
    from grandrounds.study.comparison.tables import notes, tables

    folder = out or comparison_runner.default_folder(resolved)
    resolved = dated(resolved, day_in(folder))
    with progress(screen) as listener:
        try:
            content = comparison_runner.compare(resolved, design, folder, listener)
        except KeyboardInterrupt:
            same = command("--out", folder)
            kept = f"finished parts are kept; the same command with {same} continues"
            raise KeyboardInterrupt(kept) from None
    for table in tables(content):
        screen.table(table.title, table.columns, table.rows)
    screen.notes(notes(content))
    screen.tell(f"written: {folder}/{RESULT}")
    screen.emit(content)


@contextmanager
def progress(screen: Screen) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Yield a listener for `comparison_runner.compare`: a line per part, and a bar."""
    clock = Clock()
    time_left = TextColumn("{task.fields[left]}")
    with screen.bar("reading the data", TaskProgressColumn(), time_left, left="") as (bar, task):

        def listen(event: str, facts: Mapping[str, Any]) -> None:
            clock(event, facts)
            bar.update(task, total=max(1, clock.planned), completed=clock.work, left=clock.left())
            bar.update(task, description=f"{clock.done}/{clock.units} parts")
            if line := _line(event, facts, clock):
                screen.tell(line)
            if event == "visited" and facts["count"]:
                screen.detail(f"  visited: {facts['count']:,} examples")

        yield listen


class Clock:
    """Counts finished work in training examples, and estimates the time left from it."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.units = self.done = 0
        self.planned = self.work = self._finished = 0.0
        self._has_trained = False  # loading the base says nothing about the time of the rest

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Count one event."""
        if event == "planned":
            self.started = time.monotonic()
            self.units, self.done, self.planned = facts["units"], facts["kept"], facts["work"]
        elif event == "visited":
            self.work += facts["count"]
            self._has_trained = self._has_trained or facts["count"] > 0
        else:
            self.done += 1
            self._finished += facts["work"]
            self.work = self._finished  # as planned, including what failed or was resumed

    def left(self) -> str:
        """Return `about 3 min left`; empty while there is nothing to estimate from."""
        if not self._has_trained or self.work >= self.planned:
            return ""
        spent = time.monotonic() - self.started
        seconds = spent * (self.planned - self.work) / self.work
        return (
            f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
        )


def _line(event: str, facts: Mapping[str, Any], clock: Clock) -> str:
    """Return the line for an event; empty if it only moves the bar."""
    if event == "planned":
        kept = f", {facts['kept']} finished before" if facts["kept"] else ""
        return f"comparison in {facts['directory']}: {facts['units']} parts{kept}"
    if event == "visited":
        return ""
    parts = [f"{clock.done}/{clock.units}  {facts['unit']}: loss {facts['held-out-loss']:.3f}"]
    parts += [f"{name} {100 * right:.1f} %" for name, right in facts["accuracy"].items()]
    parts += [f"{facts['seconds']:.1f} s", clock.left()]
    return "  ".join(part for part in parts if part)
