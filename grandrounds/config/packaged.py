"""The recipes and pages of documentation that the package carries.

In a checkout they lie beside the package (`configs/`, `docs/`), in a wheel within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from grandrounds.errors import ConfigError, nearest

RECIPE_ENDING = ".toml"


@dataclass(frozen=True)
class PackagedRecipe:
    """A recipe that comes with the package."""

    name: str
    """What `--config` takes in place of a file."""
    path: Path
    about: str
    """Its first line: base, data, sites and rounds."""


@cache
def packaged_recipes() -> dict[str, PackagedRecipe]:
    """Return the packaged recipes by name, in alphabetical order.

    Raises
    ------
    ConfigError
        If the installation has none.
    """
    found = {}
    for path in sorted(_folder("configs", "recipes").glob(f"*{RECIPE_ENDING}")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = PackagedRecipe(path.stem, path, first.lstrip("# "))
    return found


def packaged_recipe(name: str) -> PackagedRecipe:
    """Return a packaged recipe; raise `ConfigError` if there is none of this name."""
    known = packaged_recipes()
    if name not in known:
        raise ConfigError(
            f"No recipe is called {name!r}.{nearest(name, known)} Known: {', '.join(known)}."
        )
    return known[name]


def pages() -> dict[str, Path]:
    """Return the pages of the documentation by name."""
    return {path.stem: path for path in sorted(_folder("docs", "pages").glob("*.md"))}


def page(name: str) -> Path:
    """Return a page of the documentation; raise `ConfigError` if there is none of this name."""
    known = pages()
    if name not in known:
        raise ConfigError(
            f"The documentation has no page {name!r}.{nearest(name, known)} Known: "
            f"{', '.join(known)}."
        )
    return known[name]


def _folder(name: str, what: str) -> Path:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    raise ConfigError(
        f"The {what} of the package are missing: no {name}/ in or beside {package}. "
        "Reinstall the package."
    )
