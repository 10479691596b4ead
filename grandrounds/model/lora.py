"""The LoRA adapter on a base: tensor names and shapes, PEFT's configuration."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from grandrounds.config.keys import Config
from grandrounds.errors import ModelError, first_line
from grandrounds.model.base import base_config, is_out_of_memory, stored_bits
from grandrounds.model.patterns import (
    ALPHA_PATTERN,
    RANK_PATTERN,
    Table,
    check_patterns,
    number_at,
)
from grandrounds.model.targets import Targets, find_targets
from grandrounds.wire.adapter import MAGNITUDE, Shapes, factor_of, is_magnitude

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the path of a base's module."""


@dataclass(frozen=True)
class LoraSpec:
    """Everything that determines an adapter's tensors and how they are applied."""

    rank: int
    """r."""
    alpha: float
    """The product B A is scaled by alpha / r, or alpha / sqrt(r) if stabilised."""
    target_modules: str
    """Comma-separated names, `all-linear` or `auto`."""
    dropout: float
    """Dropout on the input of A, in training only."""
    stabilised: bool = False
    """Rank-stabilised: rsLoRA (Kalajdzievski, 2023)."""
    rank_pattern: Table[int] = ()
    """Ranks of the modules that an expression matches, as PEFT's `rank_pattern`."""
    alpha_pattern: Table[float] = ()
    """Alphas of the modules that an expression matches, as PEFT's `alpha_pattern`."""
    dora: bool = False
    """Weight-decomposed: DoRA (Liu et al., 2024), with a vector of magnitudes for each module."""

    @classmethod
    def of(cls, config: Config) -> LoraSpec:
        """Return the specification of a run's adapter, at the run's own rank."""
        lora = config.lora
        rank, alpha, targets = lora.peft_lora_r, lora.peft_lora_alpha, lora.target_modules
        return cls(
            *(rank, alpha, targets, lora.dropout, lora.use_rslora),
            rank_pattern=tuple(lora.ranks_by_pattern.items()),
            alpha_pattern=tuple(lora.alphas_by_pattern.items()),
            dora=lora.peft_use_dora,
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of the module at a path of the base."""
        return number_at(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return what the product B A of the module at a path of the base is multiplied by."""
        rank, alpha = self.rank_of(module), number_at(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def at_rank(self, rank: int) -> LoraSpec:
        """Return the same adapter with another rank; the scale of every module stays.

        Raises
        ------
        ValueError
            If the rank is another, and modules have ranks of their own.
        """
        if rank != self.rank and self.rank_pattern:
            raise ValueError(f"modules with ranks of their own have no common rank {rank}")

        def scaled(alpha: float) -> float:
            if self.stabilised:
                return alpha * math.sqrt(rank / self.rank)
            return alpha * rank / self.rank

        alphas = tuple((pattern, scaled(alpha)) for pattern, alpha in self.alpha_pattern)
        alpha = scaled(self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, alpha_pattern=alphas)

    def repeated(self, times: int) -> LoraSpec:
        """Return the specification of as many such adapters side by side, each scaled as before.

        Modules with ranks of their own have as many times these.
        """
        scaled = math.sqrt(times) if self.stabilised else times
        return dataclasses.replace(
            self,
            rank=times * self.rank,
            alpha=scaled * self.alpha,
            rank_pattern=tuple((pattern, times * rank) for pattern, rank in self.rank_pattern),
            alpha_pattern=tuple((pattern, scaled * alpha) for pattern, alpha in self.alpha_pattern),
        )

    def check_modules(self, paths: Sequence[str], name: str) -> None:
        """Raise `ModelError` if an expression matches none of the adapted modules of a base."""
        tables = {RANK_PATTERN: self.rank_pattern, ALPHA_PATTERN: self.alpha_pattern}
        check_patterns(tables, paths, name)


def add_lora(base: Any, spec: LoraSpec, name: str) -> Any:
    """Return the base with a fresh adapter, in float32 regardless of the base's type.

    Raises
    ------
    ModelError
        If a target cannot be adapted, PEFT fails, or a tensor has another rank than `spec`.
    """
    if getattr(base, "is_loaded_in_8bit", False):
        check_dequantizes(spec, 8, base.device)
    with without_bitsandbytes(needed=bool(getattr(base, "is_quantized", False))):
        return _adapted(base, spec, find_targets(base, spec.target_modules, name), name)


def check_dequantizes(spec: LoraSpec, bits: int, device: torch.device) -> None:
    """Raise `ModelError` where PEFT cannot take the norms of a quantised base for DoRA.

    PEFT (0.21) moves an 8-bit weight to dequantise it, and on a CPU leaves it without its scales.
    """
    if spec.dora and bits == 8 and device.type == "cpu":
        raise ModelError(
            "model.quantization = 8 with model.lora.peft-use-dora = true runs on a GPU only: PEFT "
            "cannot dequantise 8-bit weights on a CPU again and again. Set model.quantization = 4 "
            "or 0, or train without DoRA."
        )


def _adapted(base: Any, spec: LoraSpec, targets: Targets, name: str) -> Any:
    from peft import get_peft_model

    spec.check_modules([path for path, _ in base.named_modules() if targets.adapt(path)], name)
    try:
        model = get_peft_model(base, peft_config(spec, targets))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"PEFT cannot adapt {', '.join(targets.modules)} of {name!r} ({first_line(error)}). "
            "Name other modules in model.lora.target-modules."
        ) from error
    for tensor, parameter in adapter_parameters(model).items():
        shape = tuple(parameter.shape)
        if is_magnitude(tensor) and len(shape) == 1:
            continue
        rank = shape[0] if factor_of(tensor) == "A" else shape[-1]
        wanted = spec.rank_of(module_of(tensor))
        if len(shape) != 2 or rank != wanted:
            raise ModelError(
                f"PEFT made {tensor} of {name!r} of shape {shape}, and the rank is {wanted}. "
                "Name other modules in model.lora.target-modules."
            )
    return model


def module_of(tensor: str) -> str:
    """Return the path, in its base, of the module to which a tensor belongs."""
    return tensor.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]


def peft_config(spec: LoraSpec, targets: Targets, name: str | None = None) -> Any:
    """Return PEFT's configuration of the adapter; `name` is the base recorded in a saved one."""
    with without_bitsandbytes():
        from peft import LoraConfig, TaskType

    return LoraConfig(
        r=spec.rank,
        lora_alpha=_in_short(spec.alpha),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern={pattern: _in_short(alpha) for pattern, alpha in spec.alpha_pattern},
        use_rslora=spec.stabilised,
        use_dora=spec.dora,
        lora_dropout=spec.dropout,
        target_modules=list(targets.modules),
        exclude_modules=targets.excluded,
        fan_in_fan_out=targets.transposed,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=name,
    )


def _in_short(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


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


def adapter_layout(name: str, spec: LoraSpec) -> tuple[Shapes, Targets]:
    """Return the adapter's tensor shapes by name, and its target modules.

    The model is built on the meta device from its configuration alone, so a server can do this for
    a base of any size.
    """
    model = without_weights(name)
    with without_bitsandbytes():
        targets = find_targets(model, spec.target_modules, name)
        with torch.device("meta"):
            model = _adapted(model, spec, targets, name)
    return {n: tuple(p.shape) for n, p in adapter_parameters(model).items()}, targets


@lru_cache(maxsize=4)
def base_parameters(name: str) -> int:
    """Return the number of parameters of a base, without loading its weights."""
    return sum(p.numel() for p in without_weights(name).parameters())


def without_weights(name: str) -> Any:
    """Return the base on the meta device, built from its configuration alone."""
    from transformers import AutoModelForCausalLM

    config = base_config(name)
    stored_bits(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by the names under which PEFT saves them."""
    return {
        name.replace(f"{MAGNITUDE}.default.weight", MAGNITUDE).replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
