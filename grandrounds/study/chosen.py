"""Which recipe is meant: a file, or the name of one that comes with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from grandrounds.config.packaged import RECIPE_ENDING, packaged_recipe, packaged_recipes
from grandrounds.config.words import command
from grandrounds.data.places import FILE_ENDINGS
from grandrounds.errors import ConfigError

_LISTED = " `grandrounds recipes list` shows those of the package."


def chosen_recipe(positional: Path | None, option: Path | None) -> Path | None:
    """Return the recipe, given as an argument or as `--config`; raise `ConfigError` if it is none.

    A name without an ending, where no file or run has it, is that of a packaged recipe. What is
    there in its place is told: a run directory, data, or a file with nearly that name.
    """
    if positional and option:
        raise ConfigError(f"{positional} and --config {option} are two recipes; give one.")
    file = positional or option
    if file is None:
        return None
    try:
        is_folder = file.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{str(file)[:60]}... cannot be read: {error.strerror}.") from error
    if is_folder:
        if (file / "config.toml").is_file():
            raise ConfigError(
                f"{file} is a run directory, not a recipe: give {command('--resume', file)} to "
                f"continue that run, or {command(file / 'config.toml')} to repeat it."
            )
        if str(file) in packaged_recipes():
            return packaged_recipes()[str(file)].path
        raise ConfigError(f"{file} is a folder; a recipe is a .toml file.{_LISTED}")
    if file.name.lower().endswith(FILE_ENDINGS):
        data = command("--data", file)
        raise ConfigError(f"{file} is data, not a recipe (.toml): give it as {data}")
    if file.exists():
        return file
    if file.name == str(file) and (file.name in packaged_recipes() or not file.suffix):
        return packaged_recipe(file.name).path
    raise ConfigError(f"{file} cannot be read: No such file or directory.{_nearest(file)}")


def _nearest(file: Path) -> str:
    """Return the recipe beside a missing one, or of the package, that has nearly its name."""
    if file.suffix == RECIPE_ENDING and file.stem in packaged_recipes():
        return f" The package has it: give its name, {file.stem}."
    beside = {one.stem: str(one) for one in sorted(file.parent.glob(f"*{RECIPE_ENDING}"))}
    for found in (beside, {name: name for name in packaged_recipes()}):
        close = [stem for stem in found if stem.startswith(file.stem)]
        if close := close or difflib.get_close_matches(file.stem, found, n=1, cutoff=0.6):
            return f" Did you mean {found[close[0]]}?"
    return f" A recipe is a .toml file.{_LISTED}"
