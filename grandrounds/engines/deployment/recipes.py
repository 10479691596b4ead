"""Recipes between a consortium and its sites: as a deployment runs them, and signed.

consortium sign-recipe  a recipe → its values and hash, signed by the authority
site approve            a recipe, signed or not → approved by this site's operator
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grandrounds import storage
from grandrounds.config import recipes
from grandrounds.config.digest import canonical, recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.data.own_prompt import check_prompt
from grandrounds.engines.deployment import keys, signed
from grandrounds.engines.deployment.superlink import in_one_array
from grandrounds.errors import ConfigError
from grandrounds.server.admitted import consortium_of
from grandrounds.site.custody.approvals import Approvals, Recipe, recipe_of
from grandrounds.site.custody.site_file import SiteFile

ENDING = ".signed.json"


def deployed(*layers: Mapping[str, Scalar]) -> Config:
    """Return the configuration with which `grandrounds run --engine deployment` starts a recipe."""
    config = in_one_array(
        recipes.resolve({"data.partitioner": "iid", "train.replay-examples": 0}, *layers)
    )
    check_prompt(config.data.prompt_template, config.data.system_prompt)
    if config.lora.from_adapter and not config.lora.from_adapter_sha256:
        raise ConfigError(
            f"model.lora.from-adapter = {config.lora.from_adapter!r} without its hash, which is "
            "what sites approve: set model.lora.from-adapter-sha256, as grandrounds plan prints it."
        )
    return config


def sign_recipe(folder: Path, config: Config, target: Path) -> str:
    """Write a recipe's values and hash to a new file, signed by the consortium's authority.

    Returns
    -------
    str
        The authority's fingerprint.

    Raises
    ------
    ConfigError
        If the folder is not a consortium's, the authority's key cannot be read, or the file exists.
    """
    consortium = consortium_of(folder)
    authority = keys.read_private_key(folder / "authority.key")
    content = {
        "consortium": consortium["name"],
        "sha256": recipe_sha256(config),
        "recipe": canonical(config),
    }
    signed.write_signed(target, content, authority)
    return keys.fingerprint(authority.public_key())


def read_signed_recipe(file: Path, authority: Path) -> tuple[Config, str]:
    """Return the recipe of a signed file, and the fingerprint of the key that signed it.

    Parameters
    ----------
    authority : Path
        The consortium's `authority.pub`.

    Raises
    ------
    ConfigError
        If the file is not signed by that key, is no recipe, or its hash is another.
    """
    if not authority.is_file():
        raise ConfigError(
            f"{authority} is missing: give the consortium's authority.pub with --authority."
        )
    trusted = keys.read_public_text(storage.read_bytes(authority).decode(errors="replace"))
    content = signed.read_signed(file, "signed recipe", trusted)
    values = content.get("recipe")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} contains no recipe: ask the consortium for it again.")
    config = deployed(values)
    if recipe_sha256(config) != content.get("sha256"):
        raise ConfigError(
            f"{file} names the hash {content.get('sha256')}, but its recipe has "
            f"{recipe_sha256(config)} here: is another version of grandrounds installed?"
        )
    return config, keys.fingerprint(trusted)


def chosen(
    site: SiteFile, word: str, values: Mapping[str, Scalar], authority: Path
) -> tuple[Recipe, str]:
    """Return the recipe that an operator names, and the fingerprint of its signer, if any.

    Parameters
    ----------
    word : str
        A recipe (.toml), a signed recipe (.json), a run directory, the first digits of a hash that
        `site pending` lists, or the key of a waiting run.
    values
        Settings of `--set`, for a recipe file.

    Raises
    ------
    ConfigError
        If it names none.
    """
    path = storage.found(word)
    if path is None:
        if values:
            raise ConfigError(f"{word!r} is no recipe file, so --set has nothing to change.")
        return Approvals(site.place(site.agent.state)).named(word), ""
    if path.suffix == ".json":
        config, signer = read_signed_recipe(path, authority)
        return recipe_of(config), signer
    file = path / "config.toml" if path.is_dir() else path
    return recipe_of(deployed(recipes.load_recipe(file), values)), ""
