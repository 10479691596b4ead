"""What a caller asks for: a recipe, keys and options, resolved and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grandrounds.api.html import as_html
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.config.recipes import OPTIONS, Layer
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, nearest
from grandrounds.study.chosen import chosen_recipe
from grandrounds.study.continued import with_start
from grandrounds.study.sites import with_sites
from grandrounds.study.tables import Table

SITES_PER_ROUND = "sites_per_round"


@dataclass(frozen=True, repr=False)
class Asked:
    """A recipe with everything that was set beside it."""

    file: Path | None
    """The recipe; None: the packaged defaults."""
    layers: tuple[Layer, ...]
    """Settings by their source; a later one overrides those before it."""
    notes: tuple[str, ...] = ()
    """What a saved adapter decided, one sentence each."""

    @cached_property
    def settings(self) -> dict[str, Scalar]:
        """All settings as one mapping, without the defaults."""
        return recipes.merged(self.layers)

    @cached_property
    def config(self) -> Config:
        """Every key, checked; local paths are absolute.

        Raises
        ------
        ConfigError
            If a key or value is not allowed; all problems are told at once.
        """
        return recipes.with_absolute_paths(recipes.resolve(self.settings))

    @property
    def keys(self) -> dict[str, Scalar]:
        """Every configuration key with its value."""
        return self.config.flat()

    def all_notes(self) -> list[str]:
        """Return what a reader should know of these settings, one sentence each."""
        return [*recipes.notes(self.settings, self.file), *self.notes]

    def change(self, settings: Mapping[str, Scalar] | None = None, **options: Any) -> Asked:
        """Return this recipe with other keys and options; see `grandrounds.recipe`."""
        check_options(options)
        return _completed(Asked(self.file, self.layers), settings, **options)

    def to_toml(self) -> str:
        """Return every key as a recipe, which `grandrounds run` takes."""
        return recipes.to_toml(self.keys)

    def __repr__(self) -> str:
        return f"Asked({(self.file.stem if self.file else None)!r}, {self.settings!r})"

    def _repr_html_(self) -> str:
        default = recipes.defaults()
        rows = [(k, str(v)) for k, v in self.keys.items() if v != default.get(k)]
        name = self.file.stem if self.file else "packaged defaults"
        return as_html([Table(("key", "value"), rows, f"{name}: keys that differ from defaults")])


def asked_for(
    source: str | Path | Asked | None = None,
    settings: Mapping[str, Scalar] | None = None,
    *,
    elsewhere: bool = False,
    may_load: bool = True,
    **options: Any,
) -> Asked:
    """Return what was asked for, completed by a saved adapter and by the data; see `recipe`.

    Parameters
    ----------
    elsewhere : bool
        Whether the sites are real, so that a saved adapter and the data may be on other machines.
    may_load : bool
        Whether data that cannot be surveyed in a second are loaded for the number of sites.
    """
    if isinstance(source, Asked):
        asked = source
    elif source is not None and not isinstance(source, str | Path):
        raise ConfigError(
            f"{source!r} is no recipe: give a packaged recipe's name, a .toml file, or a recipe."
        )
    else:
        file = chosen_recipe(Path(source) if source is not None else None, None)
        asked = Asked(file, tuple(recipes.layers_of(file, None)))
    if elsewhere:  # real sites are none of the formulary's
        asked = Asked(
            asked.file,
            (
                ("the engine", {"data.partitioner": "iid", "train.replay-examples": 0}),
                *asked.layers,
            ),
        )
    return _completed(asked, settings, elsewhere=elsewhere, may_load=may_load, **options)


def _completed(
    asked: Asked,
    settings: Mapping[str, Scalar] | None,
    *,
    elsewhere: bool = False,
    may_load: bool = True,
    sites_per_round: int | None = None,
    **options: Any,
) -> Asked:
    if sites_per_round is not None and type(sites_per_round) is not int:
        raise ConfigError(f"{SITES_PER_ROUND} = {sites_per_round!r} must be an integer.")
    layers = [*asked.layers, *given(settings, options)]
    layers, continued = with_start(layers, elsewhere=elsewhere)
    layers = with_sites(layers, sites_per_round, may_load=may_load and not elsewhere)
    found = Asked(asked.file, tuple(layers), tuple(continued))
    _ = found.config  # every problem is told now
    return found


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if there is no such option."""
    known = (*OPTIONS, SITES_PER_ROUND)
    for name in options:
        if name not in known:
            raise ConfigError(
                f"There is no option {name}.{nearest(name, known)} Options: {', '.join(known)}; "
                "configuration keys go into `settings`."
            )


def given(settings: Mapping[str, Scalar] | None, options: Mapping[str, Any]) -> list[Layer]:
    """Return keys and options that were given as layers.

    Raises
    ------
    ConfigError
        If there is no such option.
    """
    check_options(options)
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f'settings = {settings!r} must be a mapping, such as {{"num-server-rounds": 4}}.'
        )
    values = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    kept = [("--set", recipes.flatten(settings))] if settings else []
    return [*kept, *recipes.layers_of(None, None, **values)]


def resolved_run(
    source: str | Path | Asked | None,
    settings: Mapping[str, Scalar] | None,
    resume: Path,
    from_round: int | None,
    options: Mapping[str, Any],
) -> Config:
    """Return the configuration of a run that is resumed, with what may change.

    Raises
    ------
    ConfigError
        If it may not change, or the run's own recipe was changed.
    RunDirectoryError
        If there is no run to resume.
    """
    if SITES_PER_ROUND in options:
        raise ConfigError("--resume continues with the sites per round that the run started with.")
    before = source.layers if isinstance(source, Asked) else ()
    if source is not None and not isinstance(source, Asked):
        file = chosen_recipe(Path(source), None)
        before = tuple(recipes.layers_of(file, None))
    changed = recipes.merged([*before, *given(settings, options)])
    if "run-directory" in changed:
        raise ConfigError("--resume writes to the run that it resumes; leave --run-dir out.")
    from grandrounds.server.directory import RunDirectory
    from grandrounds.server.resumed_files import started_with
    from grandrounds.server.resumption import continued

    directory = RunDirectory.open(resume)
    recipe = started_with(directory.path)
    try:
        recipes.resolve(recipe)  # alone: what is wrong with it is no fault of the options
    except ConfigError as error:
        raise ConfigError(f"{directory.path / 'config.toml'} was changed: {error}") from error
    place = {"resume-from": str(directory.path)}
    resumed = recipes.resolve(recipe, {"earlier-schedules": ""}, changed, place)
    return continued(recipes.with_absolute_paths(resumed), from_round)
