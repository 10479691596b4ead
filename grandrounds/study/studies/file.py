"""study.toml: recipes, seeds, arms and tables of a study; docs/studies.md describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.config import recipes as configuration
from grandrounds.config.keys import PLACES
from grandrounds.config.recipes import Layer
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, nearest
from grandrounds.storage import read_toml
from grandrounds.study.comparison import units

RUN = "run"
"""The arm that is a whole run, with its ledger; all others are arms of a comparison."""

ARMS = (RUN, units.BASE, *(arm for arm in units.ARMS if arm != units.LEAVE_ONE_OUT))
"""Arms of a cell. `leave-one-out` has an adapter for each site left out: `grandrounds compare`."""

_LONGEST = 100
"""Characters of a recipe's folder name."""

_TOP = ("title", "seeds", "arms", "config", "equal-visits", "settings", "recipes", "tables")
_OF_RECIPE = ("seeds", "arms", "config", "equal-visits")
_OF_TABLE = ("name", "recipes", "arms", "columns")
_OF_COLUMN = ("figure", "title", "minus", "over", "arm")


@dataclass(frozen=True)
class Recipe:
    """A recipe of a study: what differs from the packaged defaults, and in which cells."""

    name: str
    layers: tuple[Layer, ...]
    """Settings by their source: its recipe file, those of the study, its own."""
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    equal_visits: bool = False
    """As `grandrounds compare --equal-visits`."""

    @property
    def slug(self) -> str:
        """Its name as a folder: letters, digits, dots and dashes."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-.") or "recipe"


@dataclass(frozen=True)
class Column:
    """A column of a table: a figure of each row's cells, as mean over seeds with its interval."""

    figure: str
    """A key of a cell's figures, or `bytes`, `bytes-up`, `bytes-down`, `seconds`."""
    title: str
    minus: str = ""
    """`recipe`, `arm` or `recipe/arm` whose figure of the same seed is subtracted."""
    over: str = ""
    """The same; its figure is divided by this one's."""
    arm: str = ""
    """The arm whose figure it is; empty: the row's own."""


@dataclass(frozen=True)
class TableOf:
    """A table of a study."""

    name: str
    """Its name in the markers of a page."""
    columns: tuple[Column, ...]
    recipes: tuple[str, ...]
    """Recipes of its rows, in this order."""
    arms: tuple[str, ...] = ARMS
    """Arms of its rows, as far as a recipe has them."""


@dataclass(frozen=True)
class Study:
    """A study as its file describes it."""

    file: Path
    title: str
    recipes: Mapping[str, Recipe]
    tables: tuple[TableOf, ...]

    @property
    def folder(self) -> Path:
        """The study directory: beside its file, without `.toml`."""
        return self.file.with_suffix("")


@dataclass(frozen=True)
class _Place:
    """Where a value stands in a study file, for messages."""

    file: Path
    path: str = ""

    def error(self, key: str, said: str) -> ConfigError:
        at = f"{self.path}.{key}" if self.path else key
        return ConfigError(f"{self.file}: {at} {said}")

    def below(self, name: str) -> _Place:
        return _Place(self.file, f"{self.path}.{name}" if self.path else name)


def read_study(file: Path) -> Study:
    """Read and check a study file; its settings are checked when cells are made of them.

    Raises
    ------
    ConfigError
        If it cannot be read, or a key, a seed, an arm, a recipe or a column cannot be; the message
        says where.
    """
    if file.suffix != ".toml":
        raise ConfigError(f"{file} is not a study: give a .toml file, such as those in studies/.")
    table, place = read_toml(file), _Place(file)
    _known(table, _TOP, place)
    found = _table(table, "recipes", place)
    if not found:
        raise place.error(
            "recipes", "is missing: a study has at least one [recipes.NAME], which may be empty."
        )
    shared = _settings(_table(table, "settings", place), place.below("settings"))
    both = {name: table[name] for name in _OF_RECIPE if name in table}
    recipes = {
        name: _recipe(
            name, {**both, **_mapping(own, place.below(f"recipes.{name}"))}, shared, place
        )
        for name, own in found.items()
    }
    slugs: dict[str, str] = {}
    for recipe in recipes.values():
        other = slugs.setdefault(recipe.slug, recipe.name)
        if other != recipe.name:
            raise place.error(
                f"recipes.{recipe.name}",
                f"and recipes.{other} have the same folder name {recipe.slug!r}: rename one.",
            )
        if len(recipe.slug) > _LONGEST:
            raise place.error(
                f"recipes.{recipe.name}",
                f"has a name of {len(recipe.slug)} characters, which names a folder: give at most "
                f"{_LONGEST}.",
            )
    title = table.get("title", file.stem)
    if not isinstance(title, str):
        raise place.error("title", f"= {title!r} must be a string.")
    listed = table.get("tables", [])
    if not isinstance(listed, list):
        raise place.error("tables", "must be an array of tables: [[tables]].")
    tables = tuple(_table_of(one, recipes, place.below("tables")) for one in listed)
    names = [one.name for one in tables]
    for name in names:
        if names.count(name) > 1:
            raise place.error("tables", f"has the name {name!r} twice.")
    return Study(file, title, recipes, tables)


def _recipe(name: str, own: Mapping[str, Any], shared: Layer, at: _Place) -> Recipe:
    place = at.below(f"recipes.{name}")
    layers: list[Layer] = []
    if file := own.get("config", ""):
        if not isinstance(file, str):
            raise place.error("config", f"= {file!r} must be a path, relative to the study.")
        path = at.file.parent / file
        layers.append((f"recipe {path}", configuration.load_recipe(path)))
    settings = {key: value for key, value in own.items() if key not in _OF_RECIPE}
    layers += [shared, _settings(settings, place)]
    arms, equal = _arms(own, place), own.get("equal-visits", False)
    if not isinstance(equal, bool):
        raise place.error("equal-visits", f"= {equal!r} must be true or false.")
    if equal and units.PERSONAL not in arms:
        raise place.error("equal-visits", "= true needs the arm personal: add it to arms.")
    return Recipe(name, tuple(layers), _seeds(own, place), arms, equal)


def _settings(table: Mapping[str, Any], place: _Place) -> Layer:
    """Return overrides of the configuration, none of which a study sets itself."""
    try:
        flat: dict[str, Scalar] = configuration.flatten(table)
    except ConfigError as error:
        raise ConfigError(f"{place.file}: {place.path}.{error}") from error
    for key in ("seed", *PLACES):
        if key in flat:
            hint = "give `seeds`" if key == "seed" else "every cell has a folder of its own"
            raise place.error(key, f"is set by the study: {hint}.")
    return f"{place.file}: {place.path}", flat


def _seeds(own: Mapping[str, Any], place: _Place) -> tuple[int, ...]:
    seeds = own.get("seeds", [42])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise place.error("seeds", f"= {seeds!r} must be a list of integers, such as [1, 2, 3].")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise place.error("seeds", f"has {seed} twice: a cell is played once. Leave one out.")
    return tuple(seeds)


def _arms(own: Mapping[str, Any], place: _Place) -> tuple[str, ...]:
    arms = own.get("arms", [RUN])
    if not isinstance(arms, list) or not arms:
        raise place.error("arms", f"= {arms!r} must be a list of some of {', '.join(ARMS)}.")
    for arm in arms:
        if arm not in ARMS:
            told = (
                " It has an adapter for each site left out: use grandrounds compare."
                if arm == units.LEAVE_ONE_OUT
                else nearest(str(arm), ARMS)
            )
            raise place.error("arms", f"has {arm!r}; allowed: {', '.join(ARMS)}.{told}")
        if arms.count(arm) > 1:
            raise place.error("arms", f"has {arm!r} twice. Leave one out.")
    return tuple(arm for arm in ARMS if arm in arms)


def _table_of(table: Any, recipes: Mapping[str, Recipe], place: _Place) -> TableOf:
    _known(_mapping(table, place), _OF_TABLE, place)
    name = table.get("name", "")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9-]+", name):
        raise place.error("name", f"= {name!r} must be lower-case letters, digits and dashes.")
    rows = table.get("recipes", list(recipes))
    if not isinstance(rows, list):
        raise place.error("recipes", f"= {rows!r} must be a list of recipes here.")
    for row in rows:
        if row not in list(recipes):
            raise place.error(
                "recipes", f"has {row!r}, which is no recipe here.{nearest(str(row), recipes)}"
            )
    arms = _arms({"arms": table.get("arms", list(ARMS))}, place)
    columns = table.get("columns", [])
    if not isinstance(columns, list) or not columns:
        raise place.error("columns", 'is empty: list tables such as { figure = "private" }.')
    made = tuple(_column(one, recipes, place) for one in columns)
    return TableOf(name, made, tuple(rows), arms)


def _column(table: Any, recipes: Mapping[str, Recipe], at: _Place) -> Column:
    place = at.below("columns")
    _known(_mapping(table, place), _OF_COLUMN, place)
    for key, value in table.items():
        if not isinstance(value, str):
            raise place.error(key, f"= {value!r} must be a string.")
    if not table.get("figure"):
        raise place.error("figure", "is missing: name a figure, such as private or bytes.")
    if "minus" in table and "over" in table:
        raise place.error("minus", "and over exclude each other: give one of them.")
    pairs = [f"{recipe.name}/{arm}" for recipe in recipes.values() for arm in recipe.arms]
    for key in ("minus", "over"):
        if (other := table.get(key, "")) and other not in (*recipes, *ARMS, *pairs):
            raise place.error(
                key,
                f"= {other!r} is neither a recipe here nor an arm nor both as recipe/arm."
                f"{nearest(other, (*recipes, *pairs))}",
            )
    if (arm := table.get("arm", "")) and arm not in ARMS:
        raise place.error("arm", f"= {arm!r}; allowed: {', '.join(ARMS)}.{nearest(arm, ARMS)}")
    return Column(**{"title": table["figure"], **table})


def _known(table: Mapping[str, Any], allowed: Sequence[str], place: _Place) -> None:
    for key in table:
        if key not in allowed:
            raise place.error(
                key, f"is unknown; allowed: {', '.join(allowed)}.{nearest(key, allowed)}"
            )


def _table(table: Mapping[str, Any], name: str, place: _Place) -> Mapping[str, Any]:
    return _mapping(table.get(name, {}), place.below(name))


def _mapping(value: Any, place: _Place) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place.file}: {place.path} = {value!r} must be a table.")
    return value
