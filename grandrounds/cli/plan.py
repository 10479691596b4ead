"""`grandrounds plan`: the cost of a run in bytes, memory and time, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from grandrounds.api.asked import asked_for
from grandrounds.api.planned import planned as planned_run
from grandrounds.cli.options import (
    Assignments,
    ConfigFile,
    Data,
    Engine,
    FromAdapter,
    Model,
    Plain,
    Quiet,
    Rounds,
    Sites,
    SitesPerRound,
    Verbose,
)
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.validation import idle_last_round
from grandrounds.errors import ConfigError, DataError
from grandrounds.storage import writing
from grandrounds.study.chosen import chosen_recipe

if TYPE_CHECKING:
    from grandrounds.study.plan.forecast import Forecast

MIB = 2**20


class PlanCommand(TyperCommand):
    """The command, whose `--json` may stand without a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give `--json` the value `-` where none follows: an option, a recipe, or nothing."""
        return super().parse_args(ctx, list(with_json_value(args)))


def with_json_value(args: Sequence[str]) -> Iterator[str]:
    """Yield arguments, with `--json=-` in place of a `--json` that no file follows."""
    for word, following in zip(args, [*args[1:], ""], strict=False):
        is_file = following == "-" or not following.startswith("-")
        is_recipe = following.endswith(".toml")
        if word == "--json" and (not following or not is_file or is_recipe):
            yield "--json=-"
        else:
            yield word


def plan(
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECIPE]...",
            help="Recipe, the same as `--config`; several are shown side by side.",
        ),
    ] = None,
    config: ConfigFile = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Recipe to show side by side; repeatable.", metavar="FILE"),
    ] = None,
    assignments: Assignments = None,
    model: Model = None,
    from_adapter: FromAdapter = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Known base model with the same shapes, for an unknown one."),
    ] = None,
    data: Data = None,
    rows: Annotated[
        int | None, typer.Option(help="Number of rows, if they cannot be counted.", min=1)
    ] = None,
    rounds: Rounds = None,
    sites: Sites = None,
    sites_per_round: SitesPerRound = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run directory to check for a run that is to write there.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Where the sites will be; `deployment`: refuse what real sites refuse."),
    ] = Engine.in_process,
    uplink_mbps: Annotated[
        float | None,
        typer.Option(help="A site's uplink in Mbit/s; adds transfer times to the plan."),
    ] = None,
    downlink_mbps: Annotated[
        float | None,
        typer.Option(help="A site's downlink in Mbit/s; default: `--uplink-mbps`."),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            help="Write the plan as JSON to a file; without one, or with `-`, print only that.",
            metavar="[FILE]",
        ),
    ] = None,
    plain: Plain = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Plan the communication, memory and data of a run before it starts.

    Communication is exact if no message is lost; memory is an analytical estimate.

    Examples:

    - `grandrounds plan` (the default run)

    - `grandrounds plan configs/jsl-medllama-3-8b-100-rounds.toml --uplink-mbps 20`

    - `grandrounds plan configs/qwen2.5-7b-instruct.toml --set communication.uplink-codec=int4`

    - `grandrounds plan --compare configs/smollm2-135m-laptop.toml configs/jsl-medllama-3-8b.toml`
    """
    screen = Screen(plain, verbose=verbose, quiet=quiet, as_json=json_file == "-")
    screen.working("planning")
    files = [*(compare or []), *(more or [])]
    if not compare:
        config = chosen_recipe(files.pop(0) if files else None, config)
    link = _link(uplink_mbps, downlink_mbps)
    options: dict[str, Any] = {
        "model": model,
        "from_adapter": from_adapter,
        "data": data,
        "rounds": rounds,
        "sites": sites,
        "sites_per_round": sites_per_round,
        "run_dir": str(run_dir) if run_dir else None,
    }
    keys = recipes.parse_overrides(assignments or [])
    at_sites = engine is Engine.deployment
    planned: dict[str, Forecast] = {}
    told: dict[str, list[str]] = {}
    for file in [config, *files]:
        asked = asked_for(file, keys, elsewhere=at_sites, may_load=False, **options)
        if at_sites and (idle := idle_last_round(asked.config)):
            raise ConfigError(idle)
        name = _label(asked.file, planned)
        made = planned_run(asked, architecture, rows)
        planned[name], told[name] = made.forecast, [*asked.all_notes(), *made.warnings]
    described = {
        name: {**_described(f, link), "warnings": told[name]} for name, f in planned.items()
    }
    content: Any = described if files else next(iter(described.values()))
    if json_file == "-":
        screen.emit(content)
        return
    if json_file is not None:
        _write(Path(json_file), content)
    _show(planned, link, screen)
    if verbose:
        for name, forecast in planned.items():
            rows_of_keys = [(key, str(value)) for key, value in forecast.config.flat().items()]
            screen.table(f"configuration of {name}", ("key", "value"), rows_of_keys)
    screen.notes([line for lines in told.values() for line in lines])
    if json_file is not None:
        screen.tell(f"written: {json_file}")


def _link(uplink_mbps: float | None, downlink_mbps: float | None) -> tuple[float, float] | None:
    """Return uplink and downlink speed; None if neither is given."""
    if uplink_mbps is None:
        if downlink_mbps is not None:
            raise ConfigError("--downlink-mbps needs --uplink-mbps: a round uses both.")
        return None
    speeds = uplink_mbps, uplink_mbps if downlink_mbps is None else downlink_mbps
    for option, speed in zip(("--uplink-mbps", "--downlink-mbps"), speeds, strict=True):
        if not 0 < speed < float("inf"):
            raise ConfigError(f"{option} = {speed:g} must be a number above 0.")
    return speeds


def _label(file: Path | None, taken: Mapping[str, Any]) -> str:
    """Return the column title of a recipe; the whole path if two files share a name."""
    if file is None:
        return "packaged"
    return file.stem if file.stem not in (*taken, "pyproject") else str(file)


def _write(file: Path, content: Any) -> None:
    if file.suffix == ".toml":
        raise ConfigError(f"--json {file} would replace a recipe: give a file that ends in .json.")
    with writing(str(file), "Choose another file with --json.", DataError):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _described(forecast: Forecast, link: tuple[float, float] | None) -> dict[str, Any]:
    """Return the plan as JSON content."""
    from grandrounds.study.plan.forecast import as_dict, link_seconds
    from grandrounds.study.plan.tables import by_precision, ways

    content = dict(as_dict(forecast))
    content["codecs"] = {
        name: {
            "total-mib": plan.total_bytes / MIB,
            "total-mib-with-key-names": plan.total_bytes_with_key_names / MIB,
        }
        for name, plan in forecast.codecs.items()
    }
    content["total-mib-before-last-updates"] = forecast.plan.bytes_before_last_updates / MIB
    content["site-peak-bytes"] = {
        way.replace(" ", "-"): site.total for way, site in ways(forecast).items()
    }
    content["memory-by-precision"] = by_precision(forecast)
    if link:
        content["transfer-seconds"] = link_seconds(forecast.plan, *link)
    return content


def _show(
    planned: Mapping[str, Forecast], link: tuple[float, float] | None, screen: Screen
) -> None:
    """Show one recipe in full, or the totals of several side by side."""
    from grandrounds.study.plan.tables import notes, side_by_side, tables

    if len(planned) > 1:
        shown = [side_by_side(planned, link)]
    else:
        shown = tables(next(iter(planned.values())), link)
    for table in shown:
        screen.table(table.title, table.columns, table.rows)
    lines = [note for forecast in planned.values() for note in notes(forecast, link)]
    screen.notes(list(dict.fromkeys(lines)))
