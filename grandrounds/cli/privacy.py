"""`grandrounds privacy`: what private visits guarantee, what they spend, and what attacks find."""

from __future__ import annotations

from typing import Annotated

import typer

from grandrounds.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    Model,
    Plain,
    Recipe,
    Rounds,
    Sites,
    SitesPerRound,
)
from grandrounds.cli.request import chosen_recipe
from grandrounds.cli.screen import Screen
from grandrounds.config import recipes
from grandrounds.config.values import Scalar
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
