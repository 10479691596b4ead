"""Where a site keeps its personal adapter, and its folder as PEFT loads it.

A real site keeps it in its own state (an agent's state folder, 0600; without an agent the state
that Flower keeps for the node). Where all sites are on one machine, a rehearsal, it lies in the run
directory, since whoever started the run holds all of it anyway:

    sites/site-3/    adapter_model.safetensors, adapter_config.json, personal.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import save_file

from grandrounds import storage
from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError
from grandrounds.model.lora import LoraSpec, adapter_layout, peft_config
from grandrounds.model.saved import WEIGHTS
from grandrounds.site.personal import Personal
from grandrounds.site.visit import Visit
from grandrounds.storage import whole_folder
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, rank_of

FOLDER, FACTS = "sites", "personal.json"

_RECORD = "grandrounds-personal"


def rehearsal_folder(config: Config) -> Path | None:
    """Return where the sites of one machine keep their own adapters; None if they have none.

    Raises
    ------
    ConfigError
        If the run has no directory that the sites know.
    """
    if not config.is_personal:
        return None
    place = config.federation.resume_from or config.federation.run_directory
    if not place:
        raise ConfigError(
            "run-directory is empty, and the sites of one machine keep their personal adapters "
            "below it: set run-directory to an absolute path."
        )
    return Path(place).expanduser().absolute() / FOLDER


def site_folder(sites: Path, number: int) -> Path:
    """Return the folder of one site's personal adapter."""
    return sites / f"site-{number}"


def keep(visit: Visit, personal: Personal) -> None:
    """Keep a personal adapter at its site, in the place of an earlier one."""
    if visit.folder is not None:
        folder = site_folder(visit.folder, visit.site.partition_id)
        write_folder(folder, visit.config, personal.adapter, personal.facts)
        return
    visit.state[_RECORD] = messages.to_arrays(personal.adapter)
    visit.state[f"{_RECORD}-facts"] = ConfigRecord(dict(personal.facts))


def kept(state: RecordDict) -> tuple[Adapter, dict[str, Any]] | None:
    """Return the personal adapter in a site's state, and its facts; None if there is none."""
    arrays: ArrayRecord | None = state.array_records.get(_RECORD)
    if arrays is None:
        return None
    facts = state.config_records.get(f"{_RECORD}-facts") or ConfigRecord()
    return {name: array.numpy() for name, array in arrays.items()}, dict(facts)


def lora_of(config: Config, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> LoraSpec:
    """Return how a personal adapter is applied: as the run's, or as two of these side by side."""
    name = next(iter(shapes))
    times = rank_of({name: adapter[name]}) // rank_of_shape(name, shapes[name])
    return LoraSpec.of(config).repeated(times)


def rank_of_shape(name: str, shape: tuple[int, ...]) -> int:
    """Return the rank of a factor of this name and shape."""
    return shape[0] if ".lora_A." in name else shape[-1]


def write_folder(
    folder: Path,
    config: Config,
    adapter: Adapter,
    facts: Mapping[str, Any],
    base: str | None = None,
    mode: int = 0o777,
) -> None:
    """Write a personal adapter as PEFT loads it, atomically, in the place of an earlier one.

    Parameters
    ----------
    base : str, optional
        What the saved adapter names as its base; the run's `model.name` by default.
    mode : int
        Of the folder, less the umask; its files are as readable.
    """
    spec = LoraSpec.of(config)
    shapes, targets = adapter_layout(config.model.source, spec)
    described = peft_config(lora_of(config, adapter, shapes), targets, base or config.model.name)
    described.revision = config.model.revision or None
    described.inference_mode = True  # as PEFT saves one
    for key, value in vars(described).items():
        if isinstance(value, set):  # whose order differs from process to process
            setattr(described, key, sorted(value))
    with whole_folder(folder, replace=True, mode=mode) as partial:
        save_file(dict(adapter), partial / WEIGHTS, {"format": "pt"})
        described.save_pretrained(str(partial))
        storage.write_json(partial / FACTS, dict(facts))
