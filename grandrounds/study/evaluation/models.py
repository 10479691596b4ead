"""The base, loaded once, with each adapter in turn; adapters are checked before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grandrounds.model.base import BaseSpec, load_base
from grandrounds.model.foreign import is_plain, load_by_peft, needed_shapes
from grandrounds.model.lora import LoraSpec
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.model.saved import (
    adapter_shapes,
    check_shapes,
    fits,
    lora_spec,
    read_adapter,
    read_adapter_config,
    weights_of,
)
from grandrounds.study.evaluation.tasks import Subject


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
