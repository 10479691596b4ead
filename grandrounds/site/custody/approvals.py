"""Recipes that the site's operator has approved, and those that wait for it.

One JSON file for each recipe in `recipes/` of the agent's state, named by the recipe's hash
(`config.digest`). An approval holds for every run of exactly this recipe, until it is withdrawn.
The policy's limits apply all the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config.digest import canonical, recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.config.words import command
from grandrounds.errors import ApprovalError, ConfigError, first_line
from grandrounds.site.custody.clock import utc_text
from grandrounds.site.custody.site_file import SiteFile

FOLDER = "recipes"
MOST_PENDING = 50
"""Recipes that wait at a time; further ones are refused without being listed."""

SHORT = 12
"""Digits of a hash that are shown."""

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """A recipe that a run asked for or that the operator approved."""

    sha256: str
    """The recipe's hash."""
    values: Mapping[str, Scalar]
    """Every key that the hash covers, with its value."""
    run: str = ""
    """Key of the run that asked for it first; empty: approved before any did."""
    asked: str = ""
    """When that was, in UTC."""
    approved: str = ""
    """When the operator approved it; empty: it waits."""
    signed_by: str = ""
    """Fingerprint of the key that signed it; empty: not signed."""


def recipe_of(config: Config) -> Recipe:
    """Return the recipe of a run's configuration."""
    return Recipe(recipe_sha256(config), canonical(config))


class Approvals:
    """The recipes of a site, in a folder of its agent's state."""

    def __init__(self, state: Path) -> None:
        self._folder = state / FOLDER

    def find(self, sha256: str) -> Recipe | None:
        """Return a recipe by its hash; None if the site does not know it.

        Raises
        ------
        ConfigError
            If its file is damaged.
        """
        file = self._folder / f"{sha256}.json"
        if not SHA256.fullmatch(sha256) or not self._is_known(file):
            return None
        described = storage.read_json(file)
        values, texts = described.pop("values", None), described.values()
        known = {field.name for field in dataclasses.fields(Recipe)}
        if not (
            described.get("sha256") == sha256
            and described.keys() <= known
            and all(isinstance(text, str) for text in texts)
            and isinstance(values, dict)
            and all(isinstance(value, Scalar) for value in values.values())
        ):
            raise ConfigError(f"{file} does not describe a recipe: remove it.")
        return Recipe(values=values, **described)

    def all(self) -> list[Recipe]:
        """Return all recipes, the oldest first."""
        known = filter(self._is_known, self._folder.glob("*.json"))
        files = sorted(known, key=lambda file: file.stat().st_mtime_ns)
        return [recipe for file in files if (recipe := self.find(file.stem)) is not None]

    def pending(self) -> list[Recipe]:
        """Return the recipes that wait for approval."""
        return [recipe for recipe in self.all() if not recipe.approved]

    def named(self, word: str) -> Recipe:
        """Return the recipe whose hash, or whose run's key, begins with a word.

        Raises
        ------
        ConfigError
            If none does, or several do.
        """
        found = [r for r in self.all() if r.sha256.startswith(word) or r.run == word]
        if len(found) == 1:
            return found[0]
        known = ", ".join(recipe.sha256[:SHORT] for recipe in self.all()) or "none"
        problem = "names no recipe" if not found else "names several recipes"
        raise ConfigError(
            f"{word!r} {problem} that this site knows ({known}). Give more digits of a hash that "
            "grandrounds site pending lists, a recipe (.toml), a signed recipe (.json), or a run "
            "directory."
        )

    def approve(self, recipe: Recipe, signed_by: str) -> Recipe:
        """Approve a recipe, waiting or not yet asked for; return it as it is kept."""
        known = self.find(recipe.sha256) or recipe
        signed_by = signed_by or known.signed_by
        approved = dataclasses.replace(known, approved=utc_text(), signed_by=signed_by)
        self._write(approved)
        return approved

    def withdraw(self, recipe: Recipe) -> None:
        """Forget a recipe: approved, it is no longer; waiting, it is no longer listed."""
        with self._writing():
            (self._folder / f"{recipe.sha256}.json").unlink(missing_ok=True)

    def note(self, recipe: Recipe, run: str) -> bool:
        """List a recipe as waiting; return whether there was room for it."""
        if len(self.pending()) >= MOST_PENDING:
            return False
        self._write(dataclasses.replace(recipe, run=run, asked=utc_text()))
        return True

    def _write(self, recipe: Recipe) -> None:
        with self._writing():
            for folder in (self._folder.parent, self._folder):  # the state is its user's alone
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage.write_json(self._folder / f"{recipe.sha256}.json", dataclasses.asdict(recipe))

    def _is_known(self, file: Path) -> bool:
        """Whether a recipe has a file; raise `ConfigError` if this user cannot see that."""
        try:
            return file.is_file()
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read: {first_line(error)}. Run the command as the agent's user."
            ) from error

    def _writing(self) -> AbstractContextManager[None]:
        advice = "Run the command as the agent's user, and free the disk if it is full."
        return storage.writing(f"{self._folder}", advice, ConfigError)


def check_approved(site: SiteFile, state: Path, config: Config, run: str) -> dict[str, Any]:
    """Return what the audit log says of a recipe's approval.

    A recipe that goes on from a saved adapter always needs one: whoever chooses the adapter chooses
    in part what an update tells, and only the drawn one is chosen by nobody.

    Raises
    ------
    ApprovalError
        If an approval is needed and missing; the recipe is listed as waiting.
    """
    approvals, recipe = Approvals(state), recipe_of(config)
    known = approvals.find(recipe.sha256)
    if known is not None and known.approved:
        return {
            "recipe": recipe.sha256,
            "approved": known.approved,
            "signed-by": known.signed_by,
        }
    if not site.policy.require_approval and not config.lora.is_continued:
        return {"recipe": recipe.sha256}
    short = recipe.sha256[:SHORT]
    if known is None and not approvals.note(recipe, run):
        raise ApprovalError(
            f"waiting for approval: site {site.name!r} has {MOST_PENDING} recipes waiting and "
            "lists no more. Its operator: grandrounds site approve RECIPE."
        )
    approve = command("grandrounds", "site", "approve", short)
    raise ApprovalError(
        f"waiting for approval: site {site.name!r} has not approved recipe {short} yet. Its "
        f"operator: grandrounds site pending, then {approve}"
    )
