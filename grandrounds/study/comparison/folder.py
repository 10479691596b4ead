"""The folder of a comparison: its settings, its finished units, and what came out.

config.toml, environment.json, sites.json, exams.json, units/, runs/, comparison.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import RunDirectoryError
from grandrounds.study.comparison.units import Unit

RESULT = "comparison.json"
_RECIPE = "config.toml"


class ComparisonFolder:
    """Reads and writes one comparison; every file is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, config: Config) -> ComparisonFolder:
        """Return the folder, new or with what is finished of the same comparison; write nothing.

        Raises
        ------
        RunDirectoryError
            If it holds something else, or a comparison of another configuration, which is named
            key by key.
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
                    "Go on without these changes, or choose another folder with --out."
                )
        elif found:
            raise RunDirectoryError(
                f"{path} is not empty and holds no comparison. Choose another folder with --out."
            )
        return folder

    def begin(self, config: Config) -> None:
        """Make the folder and write the configuration into it, if it is new."""
        if not (self.path / _RECIPE).is_file():
            with self._told_plainly():
                (self.path / "units").mkdir(parents=True)
            self._write(self.path / _RECIPE, recipes.to_toml(config.recipe()))

    def check_same(self, name: str, facts: Mapping[str, Any], what: str) -> None:
        """Write facts, or raise `RunDirectoryError` if one that was written before is another.

        Parameters
        ----------
        facts
            Whatever must not change, by name. New names are added.
        what : str
            What a name stands for, in a message: `seed`.
        """
        before = self.read_json(name) or {}
        for key, value in facts.items():
            if key in before and before[key] != value:
                raise RunDirectoryError(
                    f"{self.path} was begun with other data: {what} {key} in {name} "
                    f"{_first_difference(before[key], value)}. Restore them to go on, or choose "
                    "another folder with --out."
                )
        self.write_json(name, {**before, **facts})

    def unit(self, unit: Unit) -> dict[str, Any] | None:
        """Return what a finished unit found; None if it is not finished."""
        found: dict[str, Any] | None = self.read_json(f"units/{unit.name}.json")
        return found

    def finished(self, units: Iterable[Unit]) -> dict[Unit, dict[str, Any]]:
        """Return those of the units that are finished."""
        return {unit: found for unit in units if (found := self.unit(unit)) is not None}

    def finish(self, unit: Unit, found: Mapping[str, Any]) -> None:
        """Write down a unit."""
        self.write_json(f"units/{unit.name}.json", found)

    def run_path(self, unit: Unit) -> Path:
        """Return the run directory of a federation."""
        return self.path / "runs" / unit.name

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this folder; None if it is not there."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        self._write(self.path / name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def _write(self, file: Path, text: str) -> None:
        partial = file.with_name(f".{file.name}.partial")
        with self._told_plainly():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turn a full disk or a folder without permission into one clear error."""
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"The comparison {self.path} cannot be written: {error.strerror or error}. Free "
                "some space, or choose another place with --out; what is finished is kept."
            ) from error


def _first_difference(before: Any, now: Any) -> str:
    """Return in words where two JSON values differ first."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                return f"{key}: {_first_difference(before.get(key), now.get(key))}"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                return f"site {number}: {_first_difference(old, new)}"
    return f"was {before!r} and is {now!r}"
