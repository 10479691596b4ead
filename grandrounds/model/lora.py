"""The LoRA adapter on a base: target modules, tensor names and shapes, PEFT's configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from grandrounds.model.architectures import choose_targets
from grandrounds.model.base import base_config
from grandrounds.wire.adapter import Shapes


@dataclass(frozen=True)
class LoraSpec:
    """Everything that determines an adapter's tensors and how they are applied."""

    rank: int
    """r."""
    alpha: float
    """The product B A is scaled by alpha / r."""
    target_modules: str
    """Comma-separated names, `all-linear` or `auto`."""
    dropout: float
    """Dropout on the input of A, in training only."""


def add_lora(base: Any, spec: LoraSpec, name: str) -> Any:
    """Return the base with a fresh adapter, in float32 regardless of the base's type."""
    with without_bitsandbytes(needed=bool(getattr(base, "is_quantized", False))):
        from peft import get_peft_model

        return get_peft_model(base, peft_config(spec, linear_targets(base, spec, name)))


def peft_config(spec: LoraSpec, targets: Sequence[str], name: str | None = None) -> Any:
    """Return PEFT's configuration of the adapter; `name` is the base recorded in a saved one."""
    with without_bitsandbytes():
        from peft import LoraConfig, TaskType

    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=name,
    )


@contextmanager
def without_bitsandbytes(needed: bool = False) -> Iterator[None]:
    """Hide bitsandbytes from PEFT within the context, unless it is needed or already loaded.

    PEFT (0.18 to 0.21) loads it wherever it is installed, and with it PyTorch's compiler: together
    a fifth of the start of a run. Only a quantised base needs it.
    """
    name = "bitsandbytes"
    if needed or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as for a package that is not installed
    try:
        yield
    finally:
        del sys.modules[name]
        from peft import import_utils

        for found in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
            found.cache_clear()


def linear_targets(base: Any, spec: LoraSpec, name: str) -> list[str]:
    """Return the names of the modules to adapt.

    Raises
    ------
    ModelError
        If a name matches no linear module, or PEFT has no default for the architecture.
    """
    with without_bitsandbytes():
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE,
        )

    head = base.get_output_embeddings()
    linear = sorted(
        {
            path.rpartition(".")[2]
            for path, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )
    model_type = base.config.model_type
    return choose_targets(spec.target_modules, linear, name, model_type, CHOICE.get(model_type))


def adapter_layout(name: str, spec: LoraSpec) -> tuple[Shapes, list[str]]:
    """Return the adapter's tensor shapes by name, and its target modules.

    The model is built on the meta device from its configuration alone, so a server can do this for
    a base of any size.
    """
    model = _without_weights(name)
    targets = linear_targets(model, spec, name)
    with torch.device("meta"):
        model = add_lora(model, spec, name)
    return {n: tuple(p.shape) for n, p in adapter_parameters(model).items()}, targets


@lru_cache(maxsize=4)
def base_parameters(name: str) -> int:
    """Return the number of parameters of a base, without loading its weights."""
    return sum(p.numel() for p in _without_weights(name).parameters())


def _without_weights(name: str) -> Any:
    """Return the base on the meta device, built from its configuration alone."""
    from transformers import AutoModelForCausalLM

    config = base_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by the names under which PEFT saves them."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
