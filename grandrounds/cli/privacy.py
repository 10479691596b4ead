"""`grandrounds privacy`: what private visits guarantee, what they spend, and what attacks find."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    Model,
    Plain,
    Quiet,
    Recipe,
    Rounds,
    Sites,
    SitesPerRound,
)
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, DataError
from grandrounds.quiet import quiet_libraries
from grandrounds.storage import write_json, write_text, writing
from grandrounds.study.chosen import chosen_recipe
from grandrounds.study.sites import with_sites

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Plan, audit and account for differential privacy.",
)


@app.command()
def plan(
    recipe: Recipe = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Known base model with the same shapes, for an unknown one."),
    ] = None,
    units: Annotated[
        int | None,
        typer.Option(help="Units, records or patients, that a site declares.", metavar="N", min=1),
    ] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Probability with which a step draws a unit.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a visit.", min=1)] = None,
    rounds: Rounds = None,
    sites: Sites = None,
    sites_per_round: SitesPerRound = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Epsilon of the whole run; the noise follows from it.")
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the noise in units of the clipping norm."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Probability with which the guarantee may fail.")
    ] = None,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Plan what a private recipe spends, and whether its noise leaves anything to learn.

    Loads neither model nor data. A recipe without a guarantee is planned with
    `privacy.unit-guarantee=example`.

    Examples:

    - `grandrounds privacy plan --units 1000 --target-epsilon 4`

    - `grandrounds privacy plan configs/smollm2-135m-laptop.toml --units 5000 --noise-multiplier 1`
    """
    screen = Screen(plain, as_json=as_json)
    screen.working("planning")
    given: dict[str, Scalar | None] = {
        "privacy.declared-units": units,
        "privacy.sampling-rate": sampling_rate,
        "train.training-arguments.max-steps": steps,
        "privacy.target-epsilon": target_epsilon,
        "privacy.noise-multiplier": noise_multiplier,
        "privacy.delta": delta,
    }
    if target_epsilon is not None and noise_multiplier is None:
        given["privacy.noise-multiplier"] = 0.0
    if noise_multiplier is not None and target_epsilon is None:
        given["privacy.target-epsilon"] = 0.0
    own = {key: value for key, value in given.items() if value is not None}
    read = recipes.layers_of(
        *(chosen_recipe(recipe, config), assignments), model=model, rounds=rounds, sites=sites
    )
    layers = [*read, ("the options", own)]
    if recipes.merged(layers).get("privacy.unit-guarantee", "none") == "none":
        layers.append(("the command", {"privacy.unit-guarantee": "example"}))
    settings = recipes.merged(with_sites(layers, sites_per_round))
    resolved = recipes.with_absolute_paths(recipes.resolve(settings))
    from grandrounds.study.plan import privacy

    found = privacy.plan_of_recipe(resolved, architecture)
    shown = privacy.table(found)
    if not as_json:
        screen.table(shown.title, shown.columns, shown.rows)
    screen.notes(privacy.notes(found))
    screen.emit(privacy.as_dict(found))


@app.command()
def audit(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="Recipe, or run directory whose recipe is audited and that keeps the findings.",
            metavar="[RUN_DIR|RECIPE]",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    canaries: Annotated[
        int, typer.Option(help="Invented records, each in or out by a secret coin.", min=1)
    ] = 200,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the findings; default: privacy-audit.json in the run directory, or here."
        ),
    ] = None,
    plain: Plain = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack a recipe on invented records, beside the epsilon that it claims.

    Trains the recipe in this process on a synthetic world with fresh canaries; no site takes part.
    Exit code 1 if the guarantee is shown to be broken. A bound below the claim proves nothing.

    Examples:

    - `grandrounds privacy audit runs/first`

    - `grandrounds privacy audit private.toml --canaries 1000`
    """
    screen = Screen(plain, quiet=quiet, as_json=as_json)
    screen.working("reading the configuration")
    run = target if target is not None and (target / "config.toml").is_file() else None
    file = run / "config.toml" if run else chosen_recipe(target, config)
    if run and config:
        raise ConfigError(f"{run} and --config {config} are two recipes; give one.")
    layers = recipes.layers_of(file, assignments, model=model)
    resolved = recipes.with_absolute_paths(recipes.resolve(recipes.merged(layers)))
    quiet_libraries()
    from grandrounds.study.audit.canaries import check_count

    check_count(canaries)  # before anything heavy is loaded
    from grandrounds.server.guarantees import AUDIT, is_broken
    from grandrounds.study.audit.run import audit as audited

    place = out or (run / AUDIT if run else Path(AUDIT))
    found = audited(resolved, canaries, lambda what: screen.working(what)).as_dict()
    with writing(str(place), "Choose another file with --out.", DataError):
        write_json(place, found)
    show(found, screen)
    screen.tell(f"written: {place}")
    screen.emit(found)
    if is_broken(found):
        raise typer.Exit(1)


def show(found: dict[str, Any], screen: Screen) -> None:
    """Show what an audit found: in a line, as a table, and what it does not show."""
    from grandrounds.server.guarantees import SYNTHETIC, audit_line
    from grandrounds.study.audit.words import table

    shown = table(found)
    if not screen.as_json:
        screen.table(shown.title, shown.columns, shown.rows)
    screen.still()
    screen.tell(audit_line(found), found["verdict"])
    screen.notes([SYNTHETIC])


@app.command()
def budget(
    site: Annotated[
        Path,
        typer.Option("--site", "--config", "-c", help="The site's site.toml.", metavar="site.toml"),
    ] = Path("site.toml"),
    start: Annotated[
        bool,
        typer.Option(
            "--start",
            help="Confirm that no private run has ever visited the site's data, and count from 0. "
            "For a state folder that grandrounds site init did not make.",
        ),
    ] = False,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Show a site's privacy budget: what is charged, spent, asked for and left, run by run.

    Verifies the chain of charges first; exit code 1 if it is in doubt. A run is charged whole at
    its first visit; what it asked for at a roll call is in parentheses, charges nothing and lapses
    after a day.
    """
    from grandrounds.site.custody.site_file import read_site_file

    screen, found = Screen(plain, as_json=as_json), read_site_file(site)
    quiet_libraries()
    from grandrounds.site.custody import budget_report
    from grandrounds.site.custody.budget import start as started
    from grandrounds.site.custody.state import FILE, opened

    folder = found.place(found.agent.state)
    screen.working("verifying the charges")
    if start:
        with opened(folder) as state:
            is_new = started(found, state)
        screen.tell(
            "the privacy budget starts at 0: from now on it counts as certain that no private run "
            "visited this site's data before"
            if is_new
            else "the privacy budget has been started before; nothing is changed"
        )
    is_known = (folder / FILE).exists()
    with opened(folder) if is_known else nullcontext() as known:  # looking makes no folder
        told = budget_report.report(found, known)
    if not as_json:
        screen.table(
            f"privacy budget of {told['site']}", budget_report.COLUMNS, budget_report.rows(told)
        )
    screen.still()
    screen.tell(
        *([] if is_known else [f"no state yet in {folder}"]),
        budget_report.headline(told),
        f"{told['lines']} lines, each continues the one before it",
        f"last hash: {told['last-sha256']}",
    )
    screen.emit(told)


DEMO_TASKS = 2
"""Processes of the demonstration by default: two arms train at a time, each on one thread."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the picture and the figures as JSON.", metavar="DIR")
    ] = Path("privacy-demo"),
    seed: Annotated[
        int,
        typer.Option(help="Draws which rare patients are in the data. Noise has no seed.", min=0),
    ] = 0,
    jobs: Annotated[
        int, typer.Option(help="Arms that train at a time, each on one thread.", min=1)
    ] = DEMO_TASKS,
    plain: Plain = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what differential privacy keeps and what it hides, on invented patients.

    Trains the embedded base on the data `common-and-rare` without a guarantee and at epsilon 8, 4
    and 1, offline: about two minutes on two cores. Every figure is measured in this run. It is a
    rehearsal: server and site share a process.

    Examples:

    - `grandrounds privacy demo`

    - `grandrounds privacy demo --seed 3 --out privacy-demo-3`
    """
    screen = Screen(plain, quiet=quiet, as_json=as_json)
    place = out.expanduser()
    with writing(str(place), "Choose another folder with --out.", DataError):
        place.mkdir(parents=True, exist_ok=True)
    screen.working("training without a guarantee and at epsilon 8, 4 and 1")
    quiet_libraries()
    from grandrounds.study.demonstration import words
    from grandrounds.study.demonstration.runner import demonstrate
    from grandrounds.study.report.browser import standalone
    from grandrounds.study.report.page import template

    found = demonstrate(seed, jobs, screen.tell)
    document = {"rehearsal": True, "seed": seed, "arms": found, "notes": list(words.NOTES)}
    with writing(str(place), "Choose another folder with --out.", DataError):
        write_json(place / "privacy-demo.json", document)
        svg = standalone(words.picture(found), template("figures.css"))
        write_text(place / "privacy-demo.svg", svg)
    shown = words.table(found)
    if not as_json:
        screen.table(shown.title, shown.columns, shown.rows)
    screen.still()
    screen.tell(*words.outcome(found))
    screen.notes(words.NOTES)
    screen.tell(f"written: {place / 'privacy-demo.svg'} and {place / 'privacy-demo.json'}")
    screen.emit(document)
