"""The command line. Nothing heavy is imported before the configuration is known to be right."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import grandrounds
from grandrounds.cli.ask import ask
from grandrounds.cli.compare import compare
from grandrounds.cli.consortium import app as consortium_app
from grandrounds.cli.evaluate import evaluate
from grandrounds.cli.export import export
from grandrounds.cli.options import Assignments, ConfigFile, Data, Model, Rounds
from grandrounds.cli.plan import plan
from grandrounds.cli.report import report
from grandrounds.cli.site import app as site_app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, GrandRoundsError
from grandrounds.quiet import quiet_libraries
from grandrounds.server.listeners.trackers import tracked, trackers_of

NEEDED_TO_RUN = (
    "accelerate",
    "bitsandbytes",
    "cryptography",
    "datasets",
    "datasketch",
    "flwr",
    "flwr_datasets",
    "numpy",
    "peft",
    "psutil",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
    "zstandard",
)
"""Modules of the `train` extra."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""

app = typer.Typer(
    name="grandrounds",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Engine(StrEnum):
    """Where the sites of a run live."""

    in_process = "in-process"
    simulation = "simulation"
    deployment = "deployment"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grandrounds {grandrounds.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Federated instruction tuning of medical language models.

    Each site trains a small LoRA adapter on its own examples over a frozen base; only adapters
    travel.

    **Start here:** `grandrounds run` trains the embedded model on the embedded data: no download,
    about a minute.
    """


@app.command()
def run(
    config: ConfigFile = None,
    assignments: Assignments = None,
    model: Model = None,
    data: Data = None,
    rounds: Rounds = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Where to write the run; default `runs/<date>-<time>-<model>`."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue this run directory after its last finished round."),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="`in-process`: all sites one by one, here. `simulation`: Flower's, on Ray. "
            "`deployment`: real sites, through a SuperLink."
        ),
    ] = Engine.in_process,
    client_cpus: Annotated[
        int, typer.Option(help="CPUs of one site in the simulation.", min=1)
    ] = 1,
    client_gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs of one site in the simulation; 0.5: two share one. Default: 1 where there "
            "is a GPU.",
            min=0.0,
        ),
    ] = None,
    connection: Annotated[
        str | None,
        typer.Option(help="The SuperLink of a deployment: a connection in Flower's config.toml."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no progress bar.")] = False,
) -> None:
    """Train one adapter across all sites.

    Examples:

    - `grandrounds run` (the embedded model and data, offline)

    - `grandrounds run --config configs/smollm2-135m-laptop.toml`

    - `grandrounds run --data flashcards.jsonl --rounds 10`

    - `grandrounds run --set strategy.proximal-mu=0.1 --set train.learning-rate-max=1e-3`

    - `grandrounds run --resume runs/20260101-120000-formulary`
    """
    with told_in_one_line():
        settings = recipes.from_options(
            config,
            assignments,
            model=model,
            data=data,
            rounds=rounds,
            seed=seed,
            run_directory=str(run_dir) if run_dir else None,
        )
        resolved = resolve_run(settings, resume)
        if (engine is Engine.deployment) != bool(connection):
            raise ConfigError(
                "--engine deployment and --connection NAME belong together: give both, or neither."
            )
        trackers_of(resolved.train.report_to)  # a missing one is told before anything starts
        if engine is Engine.simulation:
            from grandrounds.engines.simulation import default_gpus, simulate

            gpus = default_gpus() if client_gpus is None else client_gpus
            simulate(resolved, reporter(resolved, plain), client_cpus, gpus)
        elif engine is Engine.deployment:
            from grandrounds.engines.deployment.superlink import deploy, in_one_array

            resolved = in_one_array(resolved)
            deploy(resolved, reporter(resolved, plain), str(connection))
        else:
            run_in_process(resolved, tracked(resolved, reporter(resolved, plain)))


def resolve_run(settings: dict[str, Scalar], resume: Path | None) -> Config:
    """Return the checked configuration of a new run, or of one that is resumed."""
    if resume is None:
        return recipes.with_absolute_paths(recipes.resolve(settings))
    if "run-directory" in settings:
        raise ConfigError("--resume writes into the run that it resumes; leave --run-dir out.")
    from grandrounds.server.directory import RunDirectory

    directory = RunDirectory.open(resume)
    started_with = recipes.load_recipe(directory.path / "config.toml")
    resumed = recipes.resolve(started_with, settings, {"resume-from": str(directory.path)})
    return recipes.with_absolute_paths(resumed)


def reporter(config: Config, plain: bool) -> Any:
    """Return the display: Rich on a terminal, plain lines elsewhere or where wanted."""
    console = Console()
    if plain or not console.is_terminal:
        from grandrounds.server.listeners.plain import PlainReporter

        return PlainReporter(config)
    from grandrounds.server.listeners.terminal import RichReporter

    return RichReporter(config, console)


def run_in_process(config: Config, listener: Any) -> None:
    """Run server and sites in this process."""
    quiet_libraries()
    from grandrounds import client_app, server_app
    from grandrounds.engines.in_process import InProcessGrid

    with listener:
        grid = InProcessGrid(client_app.app, config.flat(), config.data.num_partitions)
        server_app.federate(grid, config, listener)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Print an expected failure as one line and exit with its code; a traceback means a bug."""
    # An end asked from outside is like Ctrl-C: what was started is ended, the summary written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except GrandRoundsError as error:
        print(f"grandrounds: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        what = f"; {interrupt}" if str(interrupt) else ""
        print(f"grandrounds: interrupted{what}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED_TO_RUN:
            raise
        print(
            f"grandrounds: a run needs {package}, which is not installed: "
            'pip install "grandrounds[all]"',
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


def in_one_line(below: typer.Typer) -> typer.Typer:
    """Let all commands of a group tell expected failures in one line."""
    for command in below.registered_commands:
        if command.callback is not None:
            command.callback = told_in_one_line()(command.callback)
    return below


app.add_typer(in_one_line(site_app), name="site")
app.add_typer(in_one_line(consortium_app), name="consortium")
app.command("compare")(told_in_one_line()(compare))
app.command("evaluate")(told_in_one_line()(evaluate))
app.command("plan")(told_in_one_line()(plan))
app.command("export")(told_in_one_line()(export))
app.command("ask")(told_in_one_line()(ask))
app.command("report")(told_in_one_line()(report))
