"""Whether a visit fits into this machine's memory: planned bytes against free bytes.

Checked before training for `model.gradient-checkpointing = "auto"`, and after running out of memory
to report settings that would fit.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import psutil
import torch

from grandrounds.config.keys import Config
from grandrounds.data.main_memory import container_bytes
from grandrounds.errors import ModelError, first_line
from grandrounds.model.architectures import FAMILIES, Architecture, from_config, target_modules
from grandrounds.model.base import (
    base_config,
    device_and_dtype,
    has_bfloat16,
    is_out_of_memory,
    stored_bits,
)
from grandrounds.model.devices import processes
from grandrounds.model.memory import MIB, Precision, SiteMemory, share_size, site_memory
from grandrounds.model.resident import Resident, checkpoint_activations, resident_bytes

GIB = 2**30

HEADROOM = 0.92
"""Share of the free memory that a plan may fill: allocators lose some to fragmentation, and the
plan is an estimate."""

GPU_SHARE = "GRANDROUNDS_GPU_SHARE"
"""Environment variable: share of a GPU that one process may fill when several use it."""

Result = TypeVar("Result")

_fits_without: dict[Config, bool] = {}
"""Configuration with `auto` → whether a visit fits without gradient checkpointing."""


@lru_cache(maxsize=4)
def architecture_of(name: str) -> Architecture | None:
    """Return the shapes of a base from its own configuration, or None for an unknown family."""
    described = base_config(name)
    if described.model_type not in FAMILIES:
        return None
    return from_config(name, described.to_dict(), name)


@lru_cache(maxsize=4)
def can_checkpoint(name: str) -> bool:
    """Whether transformers' model of a base supports gradient checkpointing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config(name)), None)
    return bool(getattr(model, "supports_gradient_checkpointing", True))


def device_precision(config: Config) -> Precision:
    """Return the precision of a visit on this machine."""
    _, dtype = device_and_dtype(config.model.dtype)
    autocast = config.arguments.bf16 and has_bfloat16()
    bits = stored_bits(config.model.source) or config.model.quantization
    return Precision(bits, dtype.itemsize, autocast)


def site_needs(config: Config, *, checkpointing: bool) -> SiteMemory | None:
    """Return the planned memory of a visit on this machine, or None for an unknown family.

    The CUDA context is left out: it is already allocated when free memory is measured.
    """
    base = architecture_of(config.model.source)
    if base is None:
        return None
    targets = target_modules(base, config.lora.target_modules)
    needs = site_memory(
        config, base, targets, device_precision(config), checkpointing=checkpointing
    )
    return dataclasses.replace(needs, cuda_context=0)


def free_bytes() -> int:
    """Return the bytes available to this process, including its loaded base, on its GPU or else in
    main memory."""
    if not torch.cuda.is_available():
        limits = psutil.virtual_memory().available, container_bytes(), _process_bytes()
        return int(min(limits)) + resident_bytes()
    free, total = torch.cuda.mem_get_info()
    ours = free + torch.cuda.memory_reserved()
    return min(ours, int(total * float(os.environ.get(GPU_SHARE, "1"))))


def _free_for(config: Config) -> int:
    """Return the bytes available to each process of a visit: those on a CPU share its memory."""
    return free_bytes() // (1 if torch.cuda.is_available() else processes(config))


def _process_bytes() -> int:
    """Return the bytes left under this process's address space limit (`ulimit -v`)."""
    process = psutil.Process()
    if not hasattr(psutil, "RLIMIT_AS"):
        return sys.maxsize
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    if limit == psutil.RLIM_INFINITY:
        return sys.maxsize
    return max(0, int(limit) - int(process.memory_info().vms))


def checkpoints_activations(config: Config) -> bool:
    """Return whether visits use gradient checkpointing.

    `auto` is decided once per configuration: yes if the plan without it exceeds the free memory, or
    if there is no plan for the base's family; no if the base does not support it.

    Raises
    ------
    ModelError
        If it is configured, and the base does not support it.
    """
    wanted, name = config.model.gradient_checkpointing, config.model.source
    if wanted is True and not can_checkpoint(name):
        raise ModelError(
            f"model.gradient-checkpointing = true: transformers does not support it for {name!r}. "
            'Set it to "auto" or false.'
        )
    if isinstance(wanted, bool):
        return wanted
    if not can_checkpoint(name):
        return False
    if config not in _fits_without:
        needs = site_needs(config, checkpointing=False)
        _fits_without[config] = needs is not None and needs.total <= HEADROOM * _free_for(config)
    return not _fits_without[config]


def check_fits(config: Config) -> None:
    """Check that a visit fits into the free memory by its plan, before anything is loaded.

    With `model.gradient-checkpointing = "auto"` the plan with checkpointing counts. Without a plan
    for the base's family nothing is known, and nothing refused.

    Raises
    ------
    ModelError
        If it needs more than is free; the message gives both, and settings that would fit.
    """
    checkpointing = config.model.gradient_checkpointing is not False
    needs, free = site_needs(config, checkpointing=checkpointing), _free_for(config)
    if needs is None or needs.total <= free:
        return
    how = "with" if checkpointing else "without"
    raise ModelError(
        f"A visit does not fit into memory: it needs {size_text(needs.total)} {how} gradient "
        f"checkpointing, of which {size_text(needs.base)} for the base and "
        f"{size_text(needs.activations)} for activations; {size_text(free)} available. "
        f"{_what_fits(config, checkpointing, needs, free)}"
    )


def run_visit(config: Config, resident: Resident, visit: Callable[[], Result]) -> Result:
    """Run a visit, with or without gradient checkpointing.

    If memory runs out under `auto` without it, the visit restarts with it, and later visits use it
    too. The result is the same.

    Raises
    ------
    ModelError
        If memory runs out; the message gives the plan and settings that would fit.
    """
    checkpointing = checkpoints_activations(config)
    if config.model.gradient_checkpointing == "auto" and not checkpointing:
        checkpoint_activations(resident, False)
        received = [p.detach().clone() for p in resident.parameters.values()]
        try:
            return visit()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not can_checkpoint(config.model.source):
                raise
        _fits_without[config], checkpointing = False, True
        with torch.no_grad():
            for parameter, before in zip(resident.parameters.values(), received, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        _free_unused()
    checkpoint_activations(resident, checkpointing)
    with explaining_out_of_memory(config, checkpointing):
        return visit()


def _free_unused() -> None:
    """Release the memory of a failed visit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explaining_out_of_memory(config: Config, checkpointing: bool) -> Iterator[None]:
    """Raise running out of memory as a `ModelError` with the plan and settings that would fit."""
    free = _free_for(config)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        _free_unused()
        raise ModelError(_shortage(config, checkpointing, free, reason)) from error


def _shortage(config: Config, checkpointing: bool, free: int, reason: str) -> str:
    """Return the message for running out of memory; `free` is what was available before."""
    what = "a batch" if config.train.devices == 1 else "a device's share"
    batch = f"{what} of {share_size(config)} x {config.train.seq_length} tokens"
    how = "with" if checkpointing else "without"
    text = f"Memory ran out on {batch} {how} gradient checkpointing ({reason}). "
    available = f"{size_text(free)} available"
    needs = site_needs(config, checkpointing=checkpointing)
    if needs is None:
        return (
            f"{text}{available}; the memory of {config.model.name} cannot be planned. Set "
            "model.gradient-checkpointing = true, model.quantization = 4, or a smaller "
            "train.training-arguments.per-device-train-batch-size."
        )
    text += (
        f"Planned: {size_text(needs.total)}, of which {size_text(needs.base)} for the base and "
        f"{size_text(needs.activations)} for activations; {available}. "
    )
    return text + _what_fits(config, checkpointing, needs, free)


def _what_fits(config: Config, checkpointing: bool, needs: SiteMemory, free: int) -> str:
    """Return which settings would fit, as a sentence."""
    settings = list(smaller_settings(config, checkpointing))
    fits = [f"{name} ({size_text(need)})" for name, need in settings if need <= HEADROOM * free]
    if fits:
        return f"What would fit: {'; or '.join(fits[:3])}."
    least = min((need for _, need in settings), default=needs.total)
    return f"No setting fits; the smallest takes {size_text(least)}: use another machine."


def size_text(count: int) -> str:
    """Return bytes in GiB, or in MiB below one GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def smaller_settings(config: Config, checkpointing: bool) -> Iterator[tuple[str, int]]:
    """Yield the keys to set, and the planned bytes, of settings that need less memory: first those
    that train the same, then those with a 4-bit base."""
    arguments = config.arguments
    own = config.model.quantization
    for bits in (own,) if stored_bits(config.model.source) else dict.fromkeys((own, 4)):
        for division in (1, 2, 4, 8, 16, 32):
            size, rest = divmod(arguments.per_device_train_batch_size, division)
            if rest or not size:
                break
            steps = arguments.gradient_accumulation_steps * division
            if config.privacy.sampling_rate:  # which alone gives the expected batch of a step
                steps = arguments.gradient_accumulation_steps
            for again in dict.fromkeys((checkpointing, True)):
                keys = []
                if bits != config.model.quantization:
                    keys.append(f"model.quantization = {bits}")
                if division > 1:
                    accumulated = f" with gradient-accumulation-steps = {steps}"
                    keys.append(
                        f"train.training-arguments.per-device-train-batch-size = {size}"
                        f"{'' if config.privacy.sampling_rate else accumulated}"
                    )
                if again != checkpointing:
                    keys.append("model.gradient-checkpointing = true")
                changed = dataclasses.replace(
                    config,
                    model=dataclasses.replace(config.model, quantization=bits),
                    arguments=dataclasses.replace(
                        arguments,
                        per_device_train_batch_size=size,
                        gradient_accumulation_steps=steps,
                    ),
                )
                needs = site_needs(changed, checkpointing=again)
                if keys and needs is not None:
                    yield " and ".join(keys), needs.total
