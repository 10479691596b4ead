"""The model of a process: a base, loaded once, with an adapter that is replaced in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from grandrounds.model import fused
from grandrounds.model.base import BaseSpec, load_base
from grandrounds.model.lora import LoraSpec, adapter_parameters, add_lora
from grandrounds.model.magnitudes import base_magnitudes
from grandrounds.wire.adapter import Adapter


@dataclass
class Resident:
    """The base loaded in this process, with an adapter on it."""

    base_spec: BaseSpec
    lora_spec: LoraSpec
    model: Any
    """A peft.PeftModel."""
    parameters: dict[str, torch.nn.Parameter]
    """Adapter parameters by the names under which PEFT saves them, in its order."""
    checkpointed_layers: int = 0
    """First layers whose activations are recomputed in the backward pass."""
    kept_layers: int = 0
    """First layers whose 4-bit weights are kept dequantised."""
    compiled: bool = False
    """Whether the MLPs are compiled."""

    @property
    def checkpoints_activations(self) -> bool:
        """Whether gradient checkpointing is on, in any layer."""
        return self.checkpointed_layers > 0

    @property
    def device(self) -> torch.device:
        """The adapter's device, to which batches are moved."""
        return next(iter(self.parameters.values())).device

    @cached_property
    def magnitudes(self) -> Adapter:
        """Where DoRA's magnitudes start on this base; none without DoRA."""
        return base_magnitudes(self.model) if self.lora_spec.dora else {}


_resident: Resident | None = None


def resident_bytes() -> int:
    """Return the bytes of the weights in this process; 0 before a base is loaded."""
    return sum(p.nbytes for p in _resident.model.parameters()) if _resident else 0


def resident_model(base_spec: BaseSpec, lora_spec: LoraSpec) -> Resident:
    """Return this process's model, loading the base only if it differs from the current one."""
    global _resident
    if _resident is not None and _resident.base_spec == base_spec:
        if _resident.lora_spec == lora_spec:
            return _resident
        checkpoint_activations(_resident, False)
        compile_mlps(_resident, False)
        base = _resident.model.unload()
        _resident = None  # it has no adapter now, should the next step fail
    else:
        _resident = None  # frees the old base before the new one is loaded
        base = load_base(base_spec)
    model = add_lora(base, lora_spec, base_spec.name)
    _resident = Resident(base_spec, lora_spec, model, adapter_parameters(model))
    return _resident


def checkpoint_activations(resident: Resident, wanted: bool | int) -> None:
    """Set which layers recompute their activations in the backward pass; in training mode only.

    Parameters
    ----------
    wanted
        True for all layers, False for none, or the number of first layers. These, not the last:
        while a layer is recomputed, those after it have freed what they kept.
    """
    base = resident.model.get_base_model()
    layers = _checkpointed_by_layer(base)
    count = len(layers) or 1  # a base whose layers cannot be told apart has all or nothing
    wanted = count if wanted is True else min(int(wanted), count)
    if wanted == resident.checkpointed_layers:
        return
    # transformers 5.23 renamed it.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if not wanted:
        getattr(base, f"{name}_checkpointing_disable")()
    else:
        if not resident.checkpointed_layers:
            enable = getattr(base, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = place < wanted
    resident.checkpointed_layers = wanted


def _checkpointed_by_layer(base: Any) -> list[Any]:
    """Return the layers of a base that are checkpointed one by one, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = base.get_decoder()
    layers = list(getattr(decoder, "layers", None) or ())
    return layers if all(isinstance(one, GradientCheckpointingLayer) for one in layers) else []


def keep_weights(resident: Resident, layers: int, bf16: bool) -> None:
    """Keep the 4-bit weights of the first layers dequantised; see `fused.keep_weights`."""
    fused.keep_weights(resident.model, layers, bf16)
    resident.kept_layers = layers


def compile_mlps(resident: Resident, wanted: bool) -> None:
    """Compile the MLP of every layer for batches of any length, or undo that."""
    if wanted == resident.compiled:
        return
    for module in resident.model.modules():
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, torch.nn.Module):
            if wanted:
                mlp.compile(dynamic=True)
            else:
                mlp._compiled_call_impl = None  # as before `compile`
    resident.compiled = wanted


@contextmanager
def adapter_off(resident: Resident) -> Iterator[None]:
    """Compute with the base alone within the context; what has a gradient stays as it is."""
    has_gradient = {n: p.requires_grad for n, p in resident.parameters.items()}
    try:
        with resident.model.disable_adapter():
            yield
    finally:
        for name, parameter in resident.parameters.items():  # PEFT switches all of them on
            parameter.requires_grad_(has_gradient[name])


@torch.no_grad()
def set_adapter(resident: Resident, adapter: Adapter) -> None:
    """Copy an adapter into the resident model."""
    for name, parameter in resident.parameters.items():
        parameter.copy_(torch.tensor(adapter[name]))


def adapter_of(resident: Resident) -> Adapter:
    """Return a copy of the resident adapter, in float32."""
    return {
        name: parameter.detach().float().cpu().numpy().copy()
        for name, parameter in resident.parameters.items()
    }


@torch.no_grad()
def adapter_change(resident: Resident, received: Adapter) -> Adapter:
    """Return the resident adapter minus the received one, in float32."""
    return {
        name: parameter.detach().float().cpu().numpy() - received[name]
        for name, parameter in resident.parameters.items()
    }
