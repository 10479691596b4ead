"""The command line. Nothing heavy is imported before the configuration has been validated."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

import grandrounds
from grandrounds.cli import (
    ask,
    base,
    compare,
    config,
    consortium,
    documentation,
    dossier,
    evaluate,
    export,
    plan,
    privacy,
    recipes,
    report,
    run,
    site,
    study,
)
from grandrounds.cli.output import CLOSED, guarded_output
from grandrounds.cli.screen import lifetime
from grandrounds.config.keys import ALIASES, FIELD_OF_KEY
from grandrounds.config.recipes import OPTIONS
from grandrounds.config.synonyms import MAX_STEPS, NO_KEY, PER_ROUND, key_meant, last_part
from grandrounds.config.words import shown
from grandrounds.engines.folders import ENDING
from grandrounds.errors import ConfigError, GrandRoundsError

NEEDED_TO_RUN = (
    "accelerate",
    "bitsandbytes",
    "cryptography",
    "datasets",
    "datasketch",
    "filelock",
    "flwr",
    "flwr_datasets",
    "numpy",
    "peft",
    "psutil",
    "safetensors",
    "scipy",
    "stdnum",
    "torch",
    "transformers",
    "zstandard",
)
"""Modules that a run needs, of the extras `train` and `site`."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, by shell convention."""


@contextmanager
def reported_in_one_line() -> Iterator[None]:
    """Print an expected failure as one line and exit with its code; a traceback means a bug."""
    with guarded_output() as output:
        try:
            with flushed():
                yield
        except GrandRoundsError as error:
            told = "\n".join(map(shown, str(error).split("\n")))
            print(f"grandrounds: {told}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            kept = f"; {interrupt}" if str(interrupt) else ""
            if not output.error:
                print(f"grandrounds: interrupted{kept}", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            if kept or output.exit_code != CLOSED:  # `| head` is no news
                print(f"grandrounds: {output.told}{kept}", file=sys.stderr)
            raise typer.Exit(output.exit_code) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in NEEDED_TO_RUN:
                raise
            print(
                f"grandrounds: this command needs {package}, which is not installed: "
                'pip install "grandrounds[all]"',
                file=sys.stderr,
            )
            raise typer.Exit(1) from None


@contextmanager
def flushed() -> Iterator[None]:
    """Flush standard output at the end, since its failure may show only there."""
    try:
        yield
    except click.exceptions.Exit:  # of a help page
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def end_in_order() -> None:
    """Handle SIGTERM and SIGHUP as Ctrl-C: child processes are ended, the summary is written.

    An ignored SIGHUP stays ignored: `nohup` asks for it.
    """
    for number in ENDING:
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def meant_option(error: click.NoSuchOption) -> str:
    """Return what to write instead of an option that is a key; empty if it is not known as one."""
    params = error.ctx.command.params if error.ctx else []
    if not any(param.name == "assignments" for param in params):
        return ""
    last = last_part(error.option_name)
    told = f"There is no option {error.option_name}."
    if last in PER_ROUND:
        return f"{told} Write --sites-per-round N."
    meant = key_meant(error.option_name, (*FIELD_OF_KEY, *ALIASES))
    if not meant:
        return f"{told} {NO_KEY[last]}" if last in NO_KEY else ""
    own = {key: name for name, key in OPTIONS.items()}.get(meant, "")
    if any(param.name == own for param in params):
        return f"{told} Write --{own.replace('_', '-')} VALUE."
    also = f" --set {MAX_STEPS}=-1" if meant.endswith("num-train-epochs") else ""
    return f"{told} Write --set {meant}=VALUE{also}."


def misused(error: click.UsageError) -> str:
    """Return what is wrong with a command line, with the command that explains its options."""
    told = error.format_message().rstrip(".")
    return f"{told}. See: {error.ctx.command_path} --help" if error.ctx else f"{told}."


class Commands(TyperGroup):
    """All commands, their expected failures reported in one line."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the command line; the help page is printed here."""
        with reported_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        end_in_order()
        with reported_in_one_line(), lifetime():
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                if not error.format_message():  # a group of commands without one: its help is shown
                    raise
                meant = meant_option(error) if isinstance(error, click.NoSuchOption) else ""
                raise ConfigError(meant or misused(error)) from error


app = typer.Typer(
    name="grandrounds",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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

    Each site trains a small LoRA adapter on its own examples over a frozen base model; only
    adapters leave a site.

    **Start here:** `grandrounds run` trains the built-in model on the built-in data, without
    downloads.
    """


app.add_typer(base.app, name="base")
app.add_typer(recipes.app, name="recipes")
app.add_typer(config.app, name="config")
app.add_typer(site.app, name="site")
app.add_typer(consortium.app, name="consortium")
app.add_typer(privacy.app, name="privacy")
app.add_typer(study.app, name="study")
for command in (
    *(run.run, compare.compare, evaluate.evaluate, plan.plan, export.export, ask.ask),
    report.report,
    dossier.dossier,
    documentation.docs,
):
    app.command(cls=plan.PlanCommand if command is plan.plan else None)(command)
