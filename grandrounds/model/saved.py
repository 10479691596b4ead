"""LoRA adapters as PEFT saves them: their files, their settings, and whether they fit a base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grandrounds.config.bases import hub_name
from grandrounds.errors import ModelError, first_line
from grandrounds.model.foreign import ADVICE, beyond_plain, read_weights
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.targets import Targets
from grandrounds.wire.adapter import Adapter, Shapes

WEIGHTS = "adapter_model.safetensors"
"""File of an adapter's tensors."""

PICKLE = "adapter_model.bin"
"""The same as a pickle, from earlier versions of PEFT."""


def weights_of(folder: Path) -> Path:
    """Return the file of an adapter's tensors; raise `ModelError` if there is none."""
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(
        f"{folder} has no adapter: {WEIGHTS} is missing. Save the adapter with save_pretrained, as "
        "safetensors."
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json.

    Raises
    ------
    ModelError
        If the file cannot be read or is not a JSON object.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must contain one JSON object")
    return config


def lora_spec(folder: Path) -> LoraSpec:
    """Return rank, alpha and targets of a saved adapter; raise `ModelError` unless LoRA or DoRA."""
    config = read_adapter_config(folder)
    if more := beyond_plain(config, folder):
        raise ModelError(f"the adapter {folder} is no plain LoRA ({', '.join(more)}). {ADVICE}")
    targets = config.get("target_modules")
    if isinstance(targets, list):
        # PEFT saves a set, in arbitrary order
        targets = ",".join(sorted(target.rpartition(".")[2] for target in targets))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not targets:
        raise ModelError(
            f"the adapter_config.json of {folder} must have r, lora_alpha and target_modules; "
            f"got {rank!r}, {alpha!r} and {targets!r}"
        )
    stabilised = bool(config.get("use_rslora"))
    return LoraSpec(
        *(rank, float(alpha), str(targets), 0.0, stabilised),
        rank_pattern=_pattern(config, folder, "rank_pattern"),
        alpha_pattern=_pattern(config, folder, "alpha_pattern"),
        dora=bool(config.get("use_dora")),
    )


def _pattern(config: Mapping[str, Any], folder: Path, name: str) -> tuple[tuple[str, Any], ...]:
    """Return a table of expressions and numbers of a saved adapter."""
    table = config.get(name) or {}
    if not isinstance(table, dict) or not all(type(n) in (int, float) for n in table.values()):
        raise ModelError(
            f"the adapter_config.json of {folder}: {name} must be a table of numbers, and is "
            f"{table!r}"
        )
    return tuple(table.items())


def fits(folder: Path, spec: LoraSpec, base: str) -> bool:
    """Whether an adapter has the tensors that a run would put on the base.

    PEFT asks for one matching target only.
    """
    try:
        needed, targets = adapter_layout(base, spec)
    except ModelError:
        return False
    return first_mismatch(of_the_text(adapter_shapes(folder), targets), needed) is None


def of_the_text(shapes: Shapes, targets: Targets) -> Shapes:
    """Return an adapter's tensors without those outside a composite base's text model, such as its
    vision tower: they change no text."""
    if targets.excluded is None:
        return shapes
    outside = re.compile(f"base_model.model.{targets.excluded}")
    return {name: shape for name, shape in shapes.items() if not outside.fullmatch(name)}


def check_fit(folder: Path, spec: LoraSpec, base: str) -> None:
    """Raise `ModelError` unless an adapter's tensors fit the base; neither is loaded."""
    try:
        needed, targets = adapter_layout(base, spec)
    except ModelError as error:
        raise ModelError(f"the adapter {folder} does not fit the base {base!r}: {error}") from error
    check_shapes(folder, of_the_text(adapter_shapes(folder), targets), needed, base)


def check_shapes(folder: Path, found: Shapes, needed: Shapes, base: str) -> None:
    """Raise `ModelError` if an adapter's tensors are not those that the base needs."""
    if mismatch := first_mismatch(found, needed):
        raise ModelError(
            f"the adapter {folder} does not fit the base {base!r}: {mismatch}. Use --base with "
            "the base that the adapter was trained on."
        )


def first_mismatch(found: Shapes, needed: Shapes) -> str | None:
    """Describe the first difference between an adapter's shapes and those the base needs."""
    for name, shape in needed.items():
        if name not in found:
            return f"the base needs a tensor {name}, and the adapter has none"
        if tuple(found[name]) != tuple(shape):
            return f"{name} has shape {_times(found[name])}, and the base needs {_times(shape)}"
    foreign = [name for name in found if name not in needed]
    return f"the base has no module for the tensor {foreign[0]}" if foreign else None


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a saved adapter's tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in read_weights(weights_of(folder)).items()}


def read_adapter(folder: Path) -> Adapter:
    """Return a saved adapter in float32."""
    tensors = read_weights(weights_of(folder))
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def from_hub(source: str) -> Path:
    """Return the folder of an adapter in the Hub's cache, where it is downloaded if need be.

    Parameters
    ----------
    source : str
        `owner/name`, with `@` and the revision where one is wanted.

    Raises
    ------
    ModelError
        If it is no name on the Hub, or is neither in the cache nor can be downloaded.
    """
    from huggingface_hub import snapshot_download

    name, revision = hub_name(source)
    if source.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"the adapter {source!r}: there is no such folder, and it is no name on the Hub "
            "(owner/name@revision)."
        )
    files = ["adapter_config.json", WEIGHTS, PICKLE]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=files)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the adapter {source!r} is not in the cache, and cannot be downloaded "
            f"({first_line(error)}). Check the name and the network, unset HF_HUB_OFFLINE, or give "
            "a local folder."
        ) from error
    return Path(folder)
