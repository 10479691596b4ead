"""The base, loaded once, with each adapter in turn; adapters are checked before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch

from grandrounds.errors import ModelError, first_line
from grandrounds.model.base import BaseSpec, load_base
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.study.evaluation.tasks import WEIGHTS, Subject, read_adapter_config
from grandrounds.wire.adapter import Adapter, Shapes

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
}
"""Settings of adapter_config.json that change what an adapter computes → supported values."""


class Models:
    """The models of an evaluation: one base in memory, adapters on disk."""

    def __init__(self, base_spec: BaseSpec, subjects: tuple[Subject, ...]) -> None:
        """Check that every adapter fits the base, without loading weights.

        Raises
        ------
        ModelError
            If an adapter is of an unsupported kind, or does not fit the base.
        """
        self._base_spec = base_spec
        self._specs: dict[str, LoraSpec] = {}
        for subject in subjects:
            if subject.adapter is not None:
                spec = lora_spec(subject.adapter)
                check_fit(subject.adapter, spec, base_spec.name)
                self._specs[subject.name] = spec
        self._base: Any = None

    @contextmanager
    def asked(self, subject: Subject) -> Iterator[Any]:
        """Yield the model of a subject; for the base, adapters are disabled, not removed."""
        if not self._specs:
            if self._base is None:
                self._base = load_base(self._base_spec)
            yield self._base
        elif subject.adapter is None:
            resident = resident_model(self._base_spec, next(iter(self._specs.values())))
            with resident.model.disable_adapter():
                yield resident.model
        else:
            resident = resident_model(self._base_spec, self._specs[subject.name])
            set_adapter(resident, read_adapter(subject.adapter))
            yield resident.model


def lora_spec(folder: Path) -> LoraSpec:
    """Return rank, alpha and targets of a saved adapter; raise `ModelError` unless plain LoRA."""
    config = read_adapter_config(folder)
    for key, understood in _MUST_BE.items():
        if config.get(key, understood[0]) not in understood:
            raise ModelError(
                f"the adapter {folder} has {key} = {config[key]!r}; only {understood[0]!r} is "
                "supported. Merge the adapter into its base, and evaluate the merged model as the "
                "base of target none."
            )
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
    return LoraSpec(rank=rank, alpha=float(alpha), target_modules=str(targets), dropout=0.0)


def check_fit(folder: Path, spec: LoraSpec, base: str) -> None:
    """Raise `ModelError` unless an adapter's tensors fit the base; neither is loaded."""
    try:
        needed, _ = adapter_layout(base, spec)
    except ModelError as error:
        raise ModelError(f"the adapter {folder} does not fit the base {base!r}: {error}") from error
    if mismatch := first_mismatch(adapter_shapes(folder), needed):
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
    """Return the shapes of a saved adapter's tensors by name, without reading them."""
    with _weights(folder) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_adapter(folder: Path) -> Adapter:
    """Return a saved adapter in float32."""
    with _weights(folder) as file:
        tensors: Mapping[str, torch.Tensor] = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@contextmanager
def _weights(folder: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{folder / WEIGHTS} is damaged ({first_line(error)}). Copy it again."
        ) from error
