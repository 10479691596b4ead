"""The base, loaded once, with each adapter in turn; adapters are checked before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grandrounds.errors import ModelError
from grandrounds.model.base import BaseSpec, load_base
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.model.targets import Targets
from grandrounds.study.evaluation.foreign import (
    ADVICE,
    is_plain,
    load_by_peft,
    needed_shapes,
    read_weights,
)
from grandrounds.study.evaluation.tasks import Subject, read_adapter_config, weights_of
from grandrounds.wire.adapter import Adapter, Shapes


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
            if subject.adapter is None:
                continue
            folder, base = subject.adapter, base_spec.name
            if is_plain(read_adapter_config(folder), folder):
                spec = lora_spec(folder)
                if fits(folder, spec, base):
                    self._specs[subject.name] = spec
                    continue
            found = adapter_shapes(folder)
            check_shapes(folder, found, needed_shapes(folder, base, found), base)
        self._base: Any = None

    @contextmanager
    def asked(self, subject: Subject) -> Iterator[Any]:
        """Yield the model of a subject; for the base, adapters are disabled, not removed.

        An adapter that PEFT must load gets a base of its own, which it may change.
        """
        if subject.adapter is not None and subject.name not in self._specs:
            file = weights_of(subject.adapter)
            yield load_by_peft(load_base(self._base_spec), subject.adapter, file)
        elif not self._specs:
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
    if not is_plain(config, folder):
        raise ModelError(f"the adapter {folder} is no plain LoRA. {ADVICE}")
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
    return first_mismatch(_of_the_text(adapter_shapes(folder), targets), needed) is None


def _of_the_text(shapes: Shapes, targets: Targets) -> Shapes:
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
    check_shapes(folder, _of_the_text(adapter_shapes(folder), targets), needed, base)


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
