"""The cells of a study, and cells.jsonl: one line for each that was played."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config import recipes as configuration
from grandrounds.config.keys import PLACES_AND_TRACKERS, Config
from grandrounds.config.values import Scalar
from grandrounds.config.words import command
from grandrounds.errors import ConfigError, RunDirectoryError, nearest
from grandrounds.study.comparison import units
from grandrounds.study.continued import with_start
from grandrounds.study.sites import with_sites
from grandrounds.study.studies.file import RUN, Recipe, Study

CELLS = "cells.jsonl"
_FROZEN = Path(__file__).with_name("frozen.json")
_NEEDED = {
    **{"cell": str, "recipe": str, "arm": str, "seed": int, "hash": str},
    **{"figures": dict, "seconds": int | float},
}

Line = Mapping[str, Any]
"""One line of cells.jsonl."""


@dataclass(frozen=True)
class Cell:
    """One adapter of a study, or one for each site: a recipe, an arm and a seed."""

    recipe: Recipe
    arm: str
    seed: int
    config: Config
    """Resolved, with the cell's seed."""

    @property
    def name(self) -> str:
        """Its name in cells.jsonl and for `--only`: `fedavg/run/seed-1`."""
        return f"{self.recipe.slug}/{self.arm}/seed-{self.seed}"

    @property
    def hash(self) -> str:
        """Hash of the settings that differ from the frozen ones, 16 hexadecimal digits."""
        equal: dict[str, Scalar] = {"equal-visits": True} if self.recipe.equal_visits else {}
        return hash_of({**hashed(self.config), **equal})

    @property
    def folder(self) -> str:
        """Where it is played, below the study directory. Other settings have another folder."""
        return f"cells/{self.recipe.slug}/seed-{self.seed}-{self.hash[:8]}"

    @property
    def place(self) -> str:
        """The run directory, or the comparison that all other arms of the recipe share."""
        return f"{self.folder}/{'run' if self.arm == RUN else 'comparison'}"

    def command(self) -> str:
        """Return the command that plays the cell, or its whole comparison, without the study."""
        settings = {**differing(self.config), "seed": self.seed}
        given = [w for k, v in settings.items() for w in ("--set", f"{k}={_toml(v)}")]
        if self.arm == RUN:
            return command("grandrounds", "run", *given)
        arms = ",".join(compared(self.recipe)) or units.FEDERATED
        equal = ["--equal-visits"] if self.recipe.equal_visits else []
        return command("grandrounds", "compare", "--arms", arms, *equal, *given)

    def set(self) -> dict[str, Scalar]:
        """Return its settings that differ from the packaged defaults."""
        return differing(self.config)


def compared(recipe: Recipe) -> tuple[str, ...]:
    """Return the arms that a recipe's comparison is asked for; the base is always evaluated."""
    return tuple(arm for arm in recipe.arms if arm not in (RUN, units.BASE))


def cells_of(study: Study) -> list[Cell]:
    """Return all cells, seed by seed, so that every recipe has its first seed early.

    Raises
    ------
    ConfigError
        If a recipe's settings are not valid, or an arm cannot be played with them; the message
        names the recipe.
    """
    made = {name: _resolved(study, recipe) for name, recipe in study.recipes.items()}
    longest = max(len(recipe.seeds) for recipe in study.recipes.values())
    cells = []
    for number in range(longest):
        for recipe in study.recipes.values():
            for seed in recipe.seeds[number : number + 1]:
                config = configuration.resolve(made[recipe.name].flat(), {"seed": seed})
                cells += [Cell(recipe, arm, seed, config) for arm in recipe.arms]
    return cells


def _resolved(study: Study, recipe: Recipe) -> Config:
    where = f"{study.file}: recipes.{recipe.name}"
    try:
        layers, _ = with_start(recipe.layers)
        settings = configuration.merged(with_sites(layers, may_load=True))
        config = configuration.with_absolute_paths(configuration.resolve(settings))
        if arms := compared(recipe):
            units.check_recipe(arms, config)
        if set(recipe.arms) - {RUN} and not config.data.held_out_fraction:
            raise ConfigError(
                "data.held-out-fraction = 0 leaves no examples to evaluate the arms on: set a "
                'share, for example 0.05, or play arms = ["run"].'
            )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def computing(config: Config) -> dict[str, Scalar]:
    """Return every setting that decides a result, but for the seed."""
    left_out = (*PLACES_AND_TRACKERS, "seed")
    return {k: v for k, v in sorted(config.flat().items()) if k not in left_out}


def differing(config: Config) -> dict[str, Scalar]:
    """Return the settings that decide a result and differ from the packaged defaults."""
    default = configuration.defaults()
    return {k: v for k, v in computing(config).items() if v != default[k]}


def hashed(config: Config) -> dict[str, Scalar]:
    """Return the settings that a cell's hash covers: those that differ from `frozen`.

    So a key that is added later, with a default that does what runs did before, changes no hash,
    and a packaged default that is changed later changes those of all cells that use it.
    """
    before = {**configuration.defaults(), **frozen()}
    return {k: v for k, v in computing(config).items() if v != before[k]}


@cache
def frozen() -> Mapping[str, Scalar]:
    """Return frozen.json: every key with the value that stands in no hash.

    For most keys that is the packaged default at the time when hashes were frozen, which may be
    `auto`: what it stands for is then covered. A key that is added later stands there with the
    value that does what runs did before it came. A value is never changed.
    """
    found: dict[str, Scalar] = storage.read_json(_FROZEN)
    return found


def hash_of(settings: Mapping[str, Scalar]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of settings as JSON."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _toml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def chosen(cells: Sequence[Cell], only: Iterable[str]) -> list[Cell]:
    """Return the cells that one of some words names: a recipe, an arm, or a cell with wildcards.

    Raises
    ------
    ConfigError
        If a word names none.
    """
    kept: set[str] = set()
    for word in only:
        named = [c for c in cells if word in (c.recipe.name, c.recipe.slug, c.arm)]
        named = named or [c for c in cells if fnmatch.fnmatchcase(c.name, word)]
        if not named:
            known = [n for c in cells for n in (c.recipe.name, c.arm, c.name)]
            raise ConfigError(
                f"--only {word!r} names no cell: give a recipe, an arm, or a cell such as "
                f"{cells[0].name} (with * for any).{nearest(word, known)}"
            )
        kept |= {cell.name for cell in named}
    return [cell for cell in cells if not only or cell.name in kept]


def _is_whole(line: Line) -> bool:
    """Whether a line has all that tables and lists read of it."""
    if not all(isinstance(line.get(key), kind) for key, kind in _NEEDED.items()):
        return False
    sent = line.get("bytes") or {}
    counts = [sent.get(way) for way in ("up", "down")] if isinstance(sent, dict) else [None]
    numbers = [line["seconds"], *line["figures"].values(), *(counts if sent else [])]
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)


class Lines:
    """cells.jsonl of a study directory."""

    def __init__(self, folder: Path) -> None:
        """Read the lines; one that a kill has left unfinished, at the end, is not there.

        Raises
        ------
        RunDirectoryError
            If another line is damaged; the message gives its number.
        """
        self.file = folder / CELLS
        text = storage.read_text(self.file) if self.file.is_file() else ""
        whole, _, self.torn = text.rpartition("\n")
        self.lines = [
            self._line(number, line) for number, line in enumerate(whole.split("\n"), 1) if line
        ]

    def _line(self, number: int, text: str) -> Line:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not _is_whole(line):
            raise RunDirectoryError(
                f"{self.file}, line {number}, is damaged: it is not the record of a cell. Remove "
                "the line; its cell is then read again from its folder, or played anew."
            )
        return line

    def append(self, line: Line) -> None:
        """Write a line, after removing an unfinished one."""
        advice = "Free some space; the same command continues, and finished cells are kept."
        with storage.writing(f"{self.file}", advice, RunDirectoryError):
            if self.torn:
                text = storage.read_text(self.file)
                storage.write_text(self.file, text[: len(text) - len(self.torn)])
                self.torn = ""
            storage.append_text(self.file, json.dumps(line, ensure_ascii=False) + "\n")
        self.lines.append(line)

    def of(self, cell: Cell) -> Line | None:
        """Return the newest line of a cell with its present settings; None without one."""
        return self._newest(cell, lambda line: line["hash"] == cell.hash)

    def shown(self, cell: Cell) -> Line | None:
        """Return `of`, else a line played with the same settings of other packaged defaults."""
        return self.of(cell) or self._newest(cell, lambda line: line.get("set") == cell.set())

    def has_changed(self, cell: Cell) -> bool:
        """Whether the cell was played with other settings only."""
        return self.of(cell) is None and self._newest(cell, lambda line: True) is not None

    def _newest(self, cell: Cell, fits: Any) -> Line | None:
        found = [line for line in self.lines if line["cell"] == cell.name and fits(line)]
        return found[-1] if found else None
