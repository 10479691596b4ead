"""A run that goes on from a saved adapter: what the adapter decides of its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grandrounds.config import recipes
from grandrounds.config.bases import hub_name
from grandrounds.config.keys import Config
from grandrounds.config.prompt import name_of
from grandrounds.config.recipes import Layer
from grandrounds.config.values import Scalar
from grandrounds.errors import ModelError
from grandrounds.quiet import quiet_libraries
from grandrounds.storage import found

KEY, HASH = "model.lora.from-adapter", "model.lora.from-adapter-sha256"


def with_start(
    layers: Sequence[Layer], *, elsewhere: bool = False
) -> tuple[list[Layer], list[str]]:
    """Return the layers of a configuration, completed by the saved adapter from which it goes on.

    The adapter decides base, rank, alpha and target modules where nobody has set them.

    Parameters
    ----------
    elsewhere : bool
        Whether the adapter may be on another machine, where the server is; its hash is then given.

    Returns
    -------
    tuple
        The layers, the adapter's first; and notes of what it has decided, one sentence each.

    Raises
    ------
    ConfigError
        If the adapter has another hash than the one that is set.
    ModelError
        If it cannot be read, or is none from which a run can go on.
    """
    given = recipes.merged(layers)
    place = given.get(KEY, "")
    if not isinstance(place, str) or not place:
        return list(layers), []
    if elsewhere and given.get(HASH) and found(place) is None:
        return list(layers), []
    quiet_libraries()
    from grandrounds.server.saved_start import check_hash, read_start

    saved = read_start(place)
    check_hash(saved, str(given.get(HASH, "")))
    decided: dict[str, Scalar] = dict(saved.settings)
    name, revision = hub_name(saved.base)
    if name:
        decided |= {"model.name": name, "model.revision": revision}
    if "model.name" in given:
        decided.pop("model.revision", None)
    taken = {key: value for key, value in decided.items() if key not in given}
    default = recipes.defaults()
    shown = [f"{key} = {value}" for key, value in taken.items() if value != default[key]]
    notes = [f"as the adapter of {KEY} has it: {', '.join(shown)}"] if shown else []
    start: dict[str, Scalar] = {**taken, HASH: saved.sha256}
    return [(f"the adapter {place}", start), *layers, ("its hash", {HASH: saved.sha256})], notes


def check_start(config: Config) -> list[str]:
    """Check that an adapter fits the recipe and the base, where that is here; return warnings.

    Raises
    ------
    ConfigError
        If it has another hash, rank or scale.
    ModelError
        If it does not fit the base.
    """
    if not config.lora.is_continued or config.federation.resume_from:
        return []
    quiet_libraries()
    from grandrounds.model.lora import LoraSpec, adapter_layout
    from grandrounds.server import saved_start

    saved = saved_start.read_start(config.lora.from_adapter) if config.lora.from_adapter else None
    if saved is not None:
        saved_start.check_settings(saved, config)
    try:
        shapes, targets = adapter_layout(config.model.source, LoraSpec.of(config))
    except ModelError:
        if saved is None:
            raise
        return []  # told when the base is checked, or found out by the run
    saved_start.start_of(config, shapes, targets)
    said = [saved_start.other_base(saved, config) if saved else "", _other_prompt(config)]
    return [warning for warning in said if warning]


_PROMPT = ("data.prompt-template", "data.system-prompt", "data.template-options")


def _other_prompt(config: Config) -> str:
    """Return a warning if the run that trained an adapter asked in another prompt.

    Empty if it is the same, or the adapter lies in no run directory.
    """
    path = found(config.lora.from_adapter)
    runs = [folder for folder in (path, path and path.parent) if folder and _is_run(folder)]
    if not runs:
        return ""
    before = recipes.resolve(recipes.load_recipe(runs[0] / "config.toml")).flat()
    now = config.flat()
    before[_PROMPT[0]], now[_PROMPT[0]] = (name_of(str(c[_PROMPT[0]])) for c in (before, now))
    told = [f"{key} = {before[key]!r}" for key in _PROMPT if before[key] != now[key]]
    return f"{KEY}: the adapter was trained with {' and '.join(told)}" if told else ""


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()
