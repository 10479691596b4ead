"""`grandrounds run`: train one adapter across all sites."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

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
from grandrounds.cli.request import chosen_recipe, tell
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.bases import find_base
from grandrounds.config.keys import Config
from grandrounds.config.validation import idle_last_round
from grandrounds.config.values import Scalar
from grandrounds.data.own_prompt import check_prompt
from grandrounds.engines.folders import left_behind
from grandrounds.errors import ConfigError, ModelError
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.trackers import tracked, trackers_of
from grandrounds.study.continued import with_start
from grandrounds.study.sites import with_sites


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
    layers = recipes.layers_of(
        file,
        assignments,
        model=model,
        from_adapter=from_adapter,
        data=data,
        rounds=rounds,
        sites=sites,
        seed=seed,
        run_dir=str(run_dir) if run_dir else None,
    )
    if engine is Engine.deployment and resume is None:  # real sites are none of the formulary's
        layers = [("the engine", {"data.partitioner": "iid"}), *layers]
    continued: list[str] = []
    if resume is None:
        layers, continued = with_start(layers, elsewhere=engine is Engine.deployment)
        layers = with_sites(layers, sites_per_round, may_load=engine is not Engine.deployment)
    elif sites_per_round is not None:
        raise ConfigError("--resume continues with the sites per round that the run started with.")
    settings = recipes.merged(layers)
    resolved = resolve_run(settings, resume, from_round)
    if engine is Engine.deployment and (idle := idle_last_round(resolved)):
        raise ConfigError(idle)
    check_prompt(resolved.data.prompt_template, resolved.data.system_prompt)
    find_base(resolved.model.name)  # fails now if it is not fetched
    if (engine is Engine.deployment) != bool(connection):
        raise ConfigError(
            "--engine deployment and --connection NAME belong together: give both or neither."
        )
    trackers_of(resolved.train.report_to)  # fails now if one is not installed
    warnings: list[str] = []
    if engine is not Engine.deployment:  # whose data, base and run directory are elsewhere
        from grandrounds.study import preflight

        warnings = preflight.check(resolved, from_round)
    tell([] if resume or quiet else [*recipes.notes(settings, file), *continued])
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
        if resume is None and resolved.data.prompt_template == "chat":
            resolved = with_day(resolved, at_sites=engine is Engine.deployment)
        if engine is Engine.simulation:
            from grandrounds.engines.simulation import default_cpus, default_gpus, simulate

            cpus = client_cpus or default_cpus(resolved.train.num_threads)
            gpus = default_gpus(resolved.train.devices) if client_gpus is None else client_gpus
            simulate(resolved, shown, cpus, gpus)
        elif engine is Engine.deployment:
            from grandrounds.engines.deployment.superlink import deploy

            deploy(resolved, shown, str(connection))
        else:
            from grandrounds.engines.in_process import run_in_process

            run_in_process(resolved, tracked(resolved, shown))
    screen.emit(dict(shown.summary))


def resolve_run(
    settings: dict[str, Scalar], resume: Path | None, from_round: int | None = None
) -> Config:
    """Return the validated configuration of a new run, or of one that is resumed."""
    if resume is None:
        return recipes.with_absolute_paths(recipes.resolve(settings))
    if "run-directory" in settings:
        raise ConfigError("--resume writes to the run that it resumes; leave --run-dir out.")
    from grandrounds.server.directory import RunDirectory
    from grandrounds.server.resumption import continued, started_with

    directory = RunDirectory.open(resume)
    recipe = started_with(directory.path)
    try:
        recipes.resolve(recipe)  # alone: what is wrong with it is no fault of the options
    except ConfigError as error:
        raise ConfigError(f"{directory.path / 'config.toml'} was changed: {error}") from error
    place = {"resume-from": str(directory.path)}
    resumed = recipes.resolve(recipe, {"earlier-schedules": ""}, settings, place)
    return continued(recipes.with_absolute_paths(resumed), from_round)


def with_day(config: Config, *, at_sites: bool) -> Config:
    """Return a new run's configuration with the day that its chat template prints.

    Parameters
    ----------
    at_sites : bool
        Whether the base is at the sites, perhaps only there; they refuse a run that lacks the day.
    """
    from grandrounds.model.tokenizers import dated

    with suppress(*[ModelError] * at_sites):
        return dated(config)
    return config


def reporter(config: Config, screen: Screen) -> Listener:
    """Return the listener that shows a run: Rich on a terminal, plain lines elsewhere."""
    screen.still()
    if screen.quiet or not screen.is_rich:
        from grandrounds.server.listeners.plain import PlainReporter

        return PlainReporter(config, verbose=screen.verbose, quiet=screen.quiet)
    from grandrounds.server.listeners.terminal import RichReporter

    return RichReporter(config, screen.console, screen.verbose)
