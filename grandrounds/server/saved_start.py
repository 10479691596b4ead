"""The saved adapter from which a run goes on (`model.lora.from-adapter`): found, read and checked.

It is the folder of an adapter as PEFT saves it, a run directory, or a repository on the Hub. Its
hash is that of its tensors (`wire.adapter.adapter_sha256`), which a site can compute of what it
receives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from grandrounds.config.bases import hub_name
from grandrounds.config.keys import Config
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError, ModelError, RunDirectoryError, first_line
from grandrounds.model.foreign import ADVICE
from grandrounds.model.lora import LoraSpec
from grandrounds.model.saved import (
    first_mismatch,
    from_hub,
    lora_spec,
    of_the_text,
    read_adapter,
    read_adapter_config,
    weights_of,
)
from grandrounds.model.targets import Targets
from grandrounds.server.directory import find_checkpoint
from grandrounds.storage import found, write_bytes, writing
from grandrounds.wire.adapter import Adapter, B, Shapes, adapter_sha256, shapes_of

KEY, HASH = "model.lora.from-adapter", "model.lora.from-adapter-sha256"


@dataclass(frozen=True)
class SavedStart:
    """A saved adapter, read whole."""

    place: str
    """As it was named."""
    spec: LoraSpec
    adapter: Adapter
    sha256: str
    base: str
    """The base that it names, with its revision; empty if none."""

    @property
    def settings(self) -> dict[str, Scalar]:
        """The keys of a recipe that an adapter decides, with its values."""
        spec = self.spec

        def table(pattern: tuple[tuple[str, Any], ...]) -> str:
            return json.dumps(dict(pattern)) if pattern else ""

        return {
            "model.lora.peft-lora-r": spec.rank,
            "model.lora.peft-lora-alpha": spec.alpha,
            "model.lora.use-rslora": spec.stabilised,
            "model.lora.peft-use-dora": spec.dora,
            "model.lora.target-modules": spec.target_modules,
            "model.lora.rank-pattern": table(spec.rank_pattern),
            "model.lora.alpha-pattern": table(spec.alpha_pattern),
        }


def read_start(place: str) -> SavedStart:
    """Return a saved adapter, in float32.

    Raises
    ------
    ModelError
        If there is none, or it is neither plain LoRA nor DoRA, not trained, or not finite.
    RunDirectoryError
        If it is a run directory without a checkpoint.
    """
    folder = _folder(place)
    files = (folder / "adapter_config.json", weights_of(folder))
    return _read(place, folder, tuple(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=2)
def _read(place: str, folder: Path, _times: tuple[int, ...]) -> SavedStart:
    """Return a saved adapter, read once as long as its files stay as they are."""
    try:
        spec = lora_spec(folder)
    except ModelError as error:
        why = str(error).removesuffix(ADVICE).rstrip(" .")
        raise ModelError(f"{KEY} = {place!r}: {why}. Only LoRA and DoRA go on.") from error
    adapter = read_adapter(folder)
    for name, tensor in adapter.items():
        if not np.isfinite(tensor).all():
            raise ModelError(
                f"{KEY} = {place!r}: {name} holds values that are not finite. Choose an earlier "
                "adapter."
            )
    if not any(tensor.any() for name, tensor in adapter.items() if name.endswith(B)):
        raise ModelError(
            f"{KEY} = {place!r}: B is zero in every module, so that nothing was trained yet. Leave "
            f"{KEY} empty to start afresh."
        )
    named = read_adapter_config(folder)
    base, revision = str(named.get("base_model_name_or_path") or ""), named.get("revision")
    return SavedStart(
        place, spec, adapter, adapter_sha256(adapter), f"{base}@{revision}" if revision else base
    )


def _folder(place: str) -> Path:
    """Return the folder of the adapter that a place names."""
    path = found(place)
    if path is None:
        return from_hub(place)
    if (path / "config.toml").is_file():
        return find_checkpoint(path).folder
    if not (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{KEY} = {place!r} is neither the folder of an adapter (with adapter_config.json) nor "
            "a run directory (with config.toml)."
        )
    return path


# --- In the run directory -------------------------------------------------------------------------

FILE = "start.safetensors"


def keep(run: Path, start: Adapter) -> None:
    """Keep the adapter from which a run goes on in its directory, for a resume.

    Raises
    ------
    RunDirectoryError
        If it cannot be written.
    """
    with writing(f"The run directory {run}", "Free some space.", RunDirectoryError):
        write_bytes(run / FILE, save(dict(start)))


def kept(run: Path, config: Config, shapes: Shapes) -> Adapter:
    """Return the adapter that `keep` wrote, in the order of the model's tensors.

    Raises
    ------
    RunDirectoryError
        If it is missing or damaged.
    """
    file, sha256 = run / FILE, config.lora.from_adapter_sha256
    try:
        start = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{file} cannot be read ({first_line(error)}). {_AGAIN}") from error
    if start.keys() != set(shapes) or adapter_sha256(start) != sha256:
        raise RunDirectoryError(
            f"{file} is not the adapter with the SHA-256 {sha256} from which the run goes on. "
            f"{_AGAIN}"
        )
    return {name: start[name] for name in shapes}


_AGAIN = "Restore it from a copy: sites that have not seen it yet compare with it."


# --- Checks ---------------------------------------------------------------------------------------


def start_of(config: Config, shapes: Shapes, targets: Targets) -> Adapter:
    """Return the adapter from which a run goes on, in the order of the model's tensors.

    Parameters
    ----------
    shapes, targets
        Of the adapter that the configuration puts on the base.

    Raises
    ------
    ConfigError
        If only the hash is configured, or the adapter has another one, or differs in rank, scale or
        modules.
    ModelError
        If it cannot be read, or does not fit the base.
    """
    lora = config.lora
    if not lora.from_adapter:
        raise ConfigError(
            f"{HASH} is set, but not the adapter that it is of: set {KEY} (--from-adapter)."
        )
    saved = read_start(lora.from_adapter)
    check_hash(saved, lora.from_adapter_sha256)
    check_settings(saved, config)
    adapter = {name: saved.adapter[name] for name in of_the_text(shapes_of(saved.adapter), targets)}
    if mismatch := first_mismatch(shapes_of(adapter), shapes):
        base = f" It names the base {saved.base!r}." if saved.base else ""
        raise ModelError(
            f"{KEY} = {lora.from_adapter!r} does not fit the base {config.model.source!r} with "
            f"model.lora.target-modules = {lora.target_modules!r}: {mismatch}.{base}"
        )
    return {name: adapter[name] for name in shapes}


def check_hash(saved: SavedStart, sha256: str) -> None:
    """Raise `ConfigError` if an adapter has another hash than the one that is configured."""
    if sha256 and saved.sha256 != sha256:
        raise ConfigError(
            f"{KEY} = {saved.place!r} has the SHA-256 {saved.sha256}, and {HASH} = {sha256}: it is "
            "another adapter. Correct either of the two."
        )


def check_settings(saved: SavedStart, config: Config) -> None:
    """Raise `ConfigError` if a recipe scales an adapter otherwise, or has another rank.

    Target modules are compared as tensors, since one set of them has several names. PEFT sorts the
    tables of ranks and alphas, whose order decides nothing (`model.patterns`).
    """
    own, asked = saved.spec, LoraSpec.of(config)
    wanted = saved.settings
    differing = {
        "model.lora.peft-lora-r": own.rank != asked.rank,
        "model.lora.peft-lora-alpha": own.alpha != asked.alpha,
        "model.lora.use-rslora": own.stabilised != asked.stabilised,
        "model.lora.peft-use-dora": own.dora != asked.dora,
        "model.lora.rank-pattern": dict(own.rank_pattern) != dict(asked.rank_pattern),
        "model.lora.alpha-pattern": dict(own.alpha_pattern) != dict(asked.alpha_pattern),
    }
    told = {key: wanted[key] for key, differs in differing.items() if differs}
    if told:
        raise ConfigError(_told_differences(saved.place, config.flat(), told))


def _told_differences(place: str, has: Mapping[str, Scalar], wanted: Mapping[str, Scalar]) -> str:
    differences = "; ".join(f"{key} = {has[key]!r}, and it has {wanted[key]!r}" for key in wanted)
    fitting = " ".join(f"--set {key}={_pasted(value)}" for key, value in wanted.items())
    return (
        f"{KEY} = {place!r} is an adapter of other settings: {differences}. Train it on as it is: "
        f"{fitting}"
    )


def _pasted(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"'{value}'" if isinstance(value, str) and set(value) & set('{" ') else str(value)


def with_hash(config: Config, start: Adapter) -> Config:
    """Return a configuration with the hash of the adapter from which it goes on."""
    lora = dataclasses.replace(config.lora, from_adapter_sha256=adapter_sha256(start))
    return dataclasses.replace(config, lora=lora)


def other_base(saved: SavedStart, config: Config) -> str:
    """Return a warning if an adapter names another base; empty if it names this one, or none."""
    own, _ = hub_name(saved.base)
    same = (config.model.name, Path(config.model.name).name)
    if not own or own in same or Path(own).name in same:
        return ""
    return (
        f"{KEY}: the adapter names the base {own!r}, and the run trains on "
        f"{config.model.name!r}. Of another base its weights mean nothing"
    )
