"""`grandrounds compare`: federated training against centralised, local and leave-one-out.

Nothing heavy is imported before the arguments have been validated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TaskProgressColumn, TextColumn

from grandrounds.api import compared
from grandrounds.api.asked import asked_for
from grandrounds.api.progress import Clock, comparison_line
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
from grandrounds.config.values import words_of
from grandrounds.config.words import command
from grandrounds.study.chosen import chosen_recipe
from grandrounds.study.comparison import units as comparison


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
    words = None if arms is None else comparison.check_arms(list(words_of(arms)))
    asked = asked_for(
        chosen_recipe(recipe, config),
        recipes.parse_overrides(assignments or []),
        sites_per_round=sites_per_round,
        model=model,
        from_adapter=from_adapter,
        data=data,
        rounds=rounds,
        sites=num_sites,
    )
    further = list(words_of(benchmarks or ""))
    wanted = compared.Wanted(words, seeds, sites, further, benchmark_data, limit, equal_visits)
    made = compared.prepared(asked, wanted, out)
    tell([] if quiet else asked.all_notes())
    tell(made.warnings, "warning")
    screen.working("importing the libraries")
    with progress(screen) as listener:
        try:
            result = made.play(listener)
        except KeyboardInterrupt:
            same = command("--out", made.folder)
            kept = f"finished parts are kept; the same command with {same} continues"
            raise KeyboardInterrupt(kept) from None
    from grandrounds.study.comparison.folder import RESULT

    for table in result.tables():
        screen.table(table.title, table.columns, table.rows)
    screen.notes(result.notes())
    screen.tell(f"written: {made.folder}/{RESULT}")
    screen.emit(dict(result.content))


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
            if line := comparison_line(event, facts, clock):
                screen.tell(line)
            if event == "visited" and facts["count"]:
                screen.detail(f"  visited: {facts['count']:,} examples")

        yield listen
