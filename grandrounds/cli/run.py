"""`grandrounds run`: train one adapter across all sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grandrounds.api import played
from grandrounds.api.asked import asked_for, resolved_run
from grandrounds.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    Data,
    Engine,
    FromAdapter,
    Model,
    Plain,
    Quiet,
    Recipe,
    Rounds,
    Sites,
    SitesPerRound,
    Verbose,
)
from grandrounds.cli.request import tell
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.validation import idle_last_round
from grandrounds.engines.folders import left_behind
from grandrounds.errors import ConfigError
from grandrounds.server.listeners import Listener
from grandrounds.study.chosen import chosen_recipe


def run(
    recipe: Recipe = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    from_adapter: FromAdapter = None,
    data: Data = None,
    rounds: Rounds = None,
    sites: Sites = None,
    sites_per_round: SitesPerRound = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run directory; default `runs/<date>-<time>-<model>`."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Run directory to resume after its last finished round. With --rounds N, the run "
            "goes on to N rounds, also after its end; the learning rate of what is left follows "
            "the schedule of N rounds."
        ),
    ] = None,
    from_round: Annotated[
        int | None,
        typer.Option(
            help="Resume after this earlier round; what was written later is moved to "
            "`aside-<n>` in the run directory. The last two rounds and those of checkpoints are "
            "kept; a wrong one lists them.",
            min=0,
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="`in-process`: sites one after another in this process. `simulation`: Flower's "
            "simulation on Ray. `deployment`: real sites, through a SuperLink."
        ),
    ] = Engine.in_process,
    client_cpus: Annotated[
        int | None,
        typer.Option(
            help="CPUs per site in the simulation. Default: one for each of its threads.", min=1
        ),
    ] = None,
    client_gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs per site in the simulation; with 0.5, two sites share one. As many sites "
            "run at once as the GPUs allow. Default: `train.devices` if there is a GPU, else 0.",
            min=0.0,
        ),
    ] = None,
    connection: Annotated[
        str | None,
        typer.Option(help="Connection in Flower's config.toml to the SuperLink of a deployment."),
    ] = None,
    plain: Plain = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one adapter across all sites.

    Examples:

    - `grandrounds run` (built-in model and data, offline)

    - `grandrounds run configs/smollm2-135m-laptop.toml`

    - `grandrounds run --data flashcards.jsonl --sites 4 --sites-per-round 2 --rounds 10`

    - `grandrounds run --set strategy.proximal-mu=0.1 --set train.learning-rate-max=1e-3`

    - `grandrounds run --from-adapter runs/20260101-120000-formulary --data flashcards.jsonl`

    - `grandrounds run --resume runs/20260101-120000-formulary`

    - `grandrounds run --resume runs/20260101-120000-formulary --from-round 8`

    - `grandrounds run --resume runs/20260101-120000-formulary --rounds 48`
    """
    screen = Screen(plain, verbose=verbose, quiet=quiet, as_json=as_json)
    screen.working("reading the configuration")
    if from_round is not None and resume is None:
        raise ConfigError("--from-round belongs to --resume DIR, the run that goes back.")
    file = chosen_recipe(recipe, config)
    options: dict[str, Any] = {
        "model": model,
        "from_adapter": from_adapter,
        "data": data,
        "rounds": rounds,
        "sites": sites,
        "seed": seed,
        "run_dir": str(run_dir) if run_dir else None,
    }
    settings = recipes.parse_overrides(assignments or [])
    at_sites = engine is Engine.deployment
    told: list[str] = []
    if resume is None:
        asked = asked_for(
            file,
            settings,
            elsewhere=at_sites,
            sites_per_round=sites_per_round,
            **options,
        )
        resolved, told = asked.config, asked.all_notes()
    else:
        if sites_per_round is not None:
            options["sites_per_round"] = sites_per_round
        resolved = resolved_run(file, settings, resume, from_round, options)
    if engine is Engine.deployment and (idle := idle_last_round(resolved)):
        raise ConfigError(idle)
    played.check_here(resolved)
    if (engine is Engine.deployment) != bool(connection):
        raise ConfigError(
            "--engine deployment and --connection NAME belong together: give both or neither."
        )
    warnings: list[str] = []
    if engine is not Engine.deployment:  # whose data, base and run directory are elsewhere
        from grandrounds.study import preflight

        warnings = preflight.check(resolved, from_round)
    tell([] if quiet else told)
    tell([*warnings, *left_behind()], "warning")
    if engine is Engine.deployment:
        from grandrounds.engines.deployment.superlink import in_one_array

        resolved = in_one_array(resolved)
    if resume is not None:
        from grandrounds.server import resumption

        # a deployment's ServerApp checks it: the one before may still hold the lock here
        if engine is Engine.simulation or from_round is not None:
            resumption.prepare(resolved, from_round)
    shown = reporter(resolved, screen)
    with shown:  # from here on, so that a terminal moves while libraries are imported
        if resume is None:
            resolved = played.with_day(resolved, at_sites=at_sites)
        if at_sites:
            from grandrounds.engines.deployment.superlink import deploy

            deploy(resolved, shown, str(connection))
        else:
            played.play(resolved, shown, engine, client_cpus, client_gpus)
    screen.emit(dict(shown.summary))


def reporter(config: Config, screen: Screen) -> Listener:
    """Return the listener that shows a run: Rich on a terminal, plain lines elsewhere."""
    screen.still()
    if screen.quiet or not screen.is_rich:
        from grandrounds.server.listeners.plain import PlainReporter

        return PlainReporter(config, verbose=screen.verbose, quiet=screen.quiet)
    from grandrounds.server.listeners.terminal import RichReporter

    return RichReporter(config, screen.console, screen.verbose)
