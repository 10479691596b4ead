"""The folder of a comparison: its configuration, its finished units and its results.

config.toml, environment.json, sites.json, exams.json, units/, runs/, comparison.json
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import RunDirectoryError
from grandrounds.study.comparison.units import Unit

RESULT = "comparison.json"
_RECIPE = "config.toml"


def day_in(path: Path) -> str:
    """Return the day of the chat template in the recipe of a comparison that was begun there."""
    recipe = path.expanduser() / _RECIPE
    return (
        str(recipes.load_recipe(recipe).get("data.template-date", "")) if recipe.is_file() else ""
    )


class ComparisonFolder:
    """Reads and writes the files of one comparison."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, config: Config) -> ComparisonFolder:
        """Return the folder, new or with finished units of the same comparison; write nothing.

        Raises
        ------
        RunDirectoryError
            If it holds something else, or a comparison with another configuration, whose
            differing keys are named.
        """
        folder = cls(path.expanduser().absolute())
        path, recipe = folder.path, folder.path / _RECIPE
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file. Choose another folder with --out.")
        found = {p.name for p in path.iterdir()} if path.is_dir() else set()
        if {_RECIPE, "units"} <= found:
            before = recipes.resolve(recipes.load_recipe(recipe))
            if changes := recipes.differences(before, config):
                raise RunDirectoryError(
                    f"{path} holds a comparison with another configuration: {'; '.join(changes)}. "
                    "Continue without these changes, or choose another folder with --out."
                )
        elif found:
            raise RunDirectoryError(
                f"{path} is not empty and holds no comparison. Choose another folder with --out."
            )
        return folder

    def begin(self, config: Config) -> None:
        """Create the folder and write the configuration into it, if it is new."""
        if not (self.path / _RECIPE).is_file():
            with self._writing():
                (self.path / "units").mkdir(parents=True)
                storage.write_text(self.path / _RECIPE, recipes.to_toml(config.recipe()))

    def check_same(self, name: str, values: Mapping[str, Any], what: str) -> None:
        """Add values to a file; raise `RunDirectoryError` if one differs from what it holds.

        Parameters
        ----------
        values
            Values that must not change while the comparison is continued, by key.
        what : str
            What a key is, in the message: `seed`.
        """
        before = self.read_json(name) or {}
        for key, value in values.items():
            if key in before and before[key] != _known_before(before[key], value):
                raise RunDirectoryError(
                    f"{self.path} was started with other data: {what} {key} in {name} "
                    f"{_first_difference(before[key], value)}. Restore the data to continue, or "
                    "choose another folder with --out."
                )
        self.write_json(name, {**before, **values})

    def unit(self, unit: Unit) -> dict[str, Any] | None:
        """Return the result of a unit; None if it is not finished."""
        return self.read_json(f"units/{unit.name}.json")

    def finished(self, units: Iterable[Unit]) -> dict[Unit, dict[str, Any]]:
        """Return the results of the finished units."""
        return {unit: found for unit in units if (found := self.unit(unit)) is not None}

    def finish(self, unit: Unit, found: Mapping[str, Any]) -> None:
        """Write the result of a unit."""
        self.write_json(f"units/{unit.name}.json", found)

    def run_path(self, unit: Unit) -> Path:
        """Return the run directory of a federation."""
        return self.path / "runs" / unit.name

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of this folder; None if there is none."""
        file = self.path / name
        return storage.read_json(file) if file.is_file() else None

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file into this folder."""
        file = self.path / name
        with self._writing():
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_json(file, data)

    def _writing(self) -> AbstractContextManager[None]:
        advice = "Free some space, or choose another folder with --out; finished units are kept."
        return storage.writing(f"The comparison {self.path}", advice, RunDirectoryError)


def _known_before(before: Any, now: Any) -> Any:
    """Return a list of facts without those that an earlier version did not record."""
    if not isinstance(before, list) or not isinstance(now, list) or len(before) != len(now):
        return now
    pairs = zip(before, now, strict=True)
    return [
        {k: v for k, v in new.items() if k in old} if isinstance(old, Mapping) else new
        for old, new in pairs
    ]


def _first_difference(before: Any, now: Any) -> str:
    """Describe the first difference between two JSON values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                return f"{key}: {_first_difference(before.get(key), now.get(key))}"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                return f"site {number}: {_first_difference(old, new)}"
    return f"was {before!r} and is {now!r}"
