"""Does a visit fit into this machine's memory? The plan's figures beside what is free.

Asked before training, for `model.gradient-checkpointing = "auto"`, and after memory ran out, to say
what would fit.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from grandrounds.config.keys import Config
from grandrounds.errors import ModelError, first_line
from grandrounds.model.activations import Precision
from grandrounds.model.architectures import (
    FAMILIES,
    Architecture,
    adapter_shapes,
    from_config,
    target_modules,
)
from grandrounds.model.base import base_config, device_and_dtype, has_bfloat16
from grandrounds.model.memory import SiteMemory, site_memory
from grandrounds.model.resident import Resident, checkpoint_activations, resident_bytes

GIB = 2**30

HEADROOM = 0.92
"""Share of the free memory that a plan may fill: an allocator loses some of it to gaps, and the
plan has not been measured on a GPU."""

GPU_SHARE = "GRANDROUNDS_GPU_SHARE"
"""Environment variable: the share of a GPU that one process may fill, where several share it."""

_SHORT = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
"""What errors say, beside `torch.OutOfMemoryError`, when memory ran out."""

Result = TypeVar("Result")

_fits_without: dict[Config, bool] = {}
"""Configuration with `auto` → whether a visit fits without gradient checkpointing."""


@lru_cache(maxsize=4)
def architecture_of(name: str) -> Architecture | None:
    """Return the shapes of a base by its own configuration; None if its family is not known."""
    described = base_config(name)
    if described.model_type not in FAMILIES:
        return None
    return from_config(name, described.to_dict(), name)


def device_precision(config: Config) -> Precision:
    """Return the types of a visit on this machine."""
    device, dtype = device_and_dtype(config.model.dtype)
    autocast = config.arguments.bf16 and device.type == "cuda" and has_bfloat16()
    return Precision(config.model.quantization, dtype.itemsize, autocast)


def site_needs(config: Config, *, checkpointing: bool) -> SiteMemory | None:
    """Return a visit's memory on this machine as planned; None if the base's family is not known.

    The context of CUDA is not in it: it is taken already when free memory is asked for.
    """
    base = architecture_of(config.model.name)
    if base is None:
        return None
    targets = target_modules(base, config.lora.target_modules)
    needs = site_memory(
        config,
        base,
        targets,
        adapter_shapes(base, targets, config.lora.peft_lora_r),
        device_precision(config),
        checkpointing=checkpointing,
    )
    return dataclasses.replace(needs, cuda_context=0)


def free_bytes() -> int:
    """Return the bytes that this process can have, its base included: on its GPU, or else in main
    memory."""
    if not torch.cuda.is_available():
        limits = psutil.virtual_memory().available, _container_bytes(), _process_bytes()
        return int(min(limits)) + resident_bytes()
    free, total = torch.cuda.mem_get_info()
    ours = free + torch.cuda.memory_reserved()
    return min(ours, int(total * float(os.environ.get(GPU_SHARE, "1"))))


def _process_bytes() -> int:
    """Return what a limit on this process's address space leaves (`ulimit -v`)."""
    process = psutil.Process()
    if not hasattr(psutil, "RLIMIT_AS"):
        return sys.maxsize
    limit, _ = process.rlimit(psutil.RLIMIT_AS)
    if limit == psutil.RLIM_INFINITY:
        return sys.maxsize
    return max(0, int(limit) - int(process.memory_info().vms))


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what the control group of a container leaves (cgroup v2); without one, no limit."""
    try:
        limit, used = ((group / f"memory.{n}").read_text().strip() for n in ("max", "current"))
    except OSError:
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - int(used))


def checkpoints_activations(config: Config) -> bool:
    """Return whether activations are computed again in the backward pass.

    For `auto` this is decided once for a configuration: yes if a visit without it is planned to
    take more than is free, or cannot be planned.
    """
    wanted = config.model.gradient_checkpointing
    if isinstance(wanted, bool):
        return wanted
    if config not in _fits_without:
        needs = site_needs(config, checkpointing=False)
        _fits_without[config] = needs is not None and needs.total <= HEADROOM * free_bytes()
    return not _fits_without[config]


def run_visit(config: Config, resident: Resident, visit: Callable[[], Result]) -> Result:
    """Run a visit, with gradient checkpointing or without.

    Where `auto` went without and memory ran out, the visit is run again from its start with it, and
    so is every later one; what is learned is the same.

    Raises
    ------
    ModelError
        If memory ran out; it says what was planned and what would fit.
    """
    checkpointing = checkpoints_activations(config)
    if config.model.gradient_checkpointing == "auto" and not checkpointing:
        checkpoint_activations(resident, False)
        received = [p.detach().clone() for p in resident.parameters.values()]
        try:
            return visit()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        _fits_without[config], checkpointing = False, True
        with torch.no_grad():
            for parameter, before in zip(resident.parameters.values(), received, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        _let_go()
    checkpoint_activations(resident, checkpointing)
    with memory_told(config, checkpointing):
        return visit()


def _let_go() -> None:
    """Give back what a visit that failed left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


@contextmanager
def memory_told(config: Config, checkpointing: bool) -> Iterator[None]:
    """Turn memory that ran out into a `ModelError` with the plan's figures and what would fit."""
    free = free_bytes()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        _let_go()
        raise ModelError(shortage(config, checkpointing, free, reason)) from error


def shortage(config: Config, checkpointing: bool, free: int, reason: str) -> str:
    """Return what to tell after memory ran out; `free` is what could be had before."""
    arguments = config.arguments
    batch = f"{arguments.per_device_train_batch_size} x {config.train.seq_length} tokens"
    how = "with" if checkpointing else "without"
    told = f"Memory ran out at a batch of {batch} {how} gradient checkpointing ({reason}). "
    needs = site_needs(config, checkpointing=checkpointing)
    if needs is None:
        return (
            f"{told}{size_text(free)} can be had; what {config.model.name} needs cannot be "
            "planned. Set model.gradient-checkpointing = true, model.quantization = 4, or a "
            "smaller train.training-arguments.per-device-train-batch-size."
        )
    told += (
        f"Planned: {size_text(needs.total)}, of them {size_text(needs.base)} for the base and "
        f"{size_text(needs.activations)} for activations; {size_text(free)} can be had. "
    )
    fitting = [
        f"{setting} ({size_text(need)})"
        for setting, need in smaller(config, checkpointing)
        if need <= HEADROOM * free
    ]
    if fitting:
        return f"{told}What would fit: {'; or '.join(fitting[:3])}."
    least = min((need for _, need in smaller(config, checkpointing)), default=needs.total)
    return f"{told}No setting fits; the smallest takes {size_text(least)}: use another machine."


def size_text(count: int) -> str:
    """Return bytes in GiB, or in MiB where they are fewer than one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def smaller(config: Config, checkpointing: bool) -> Iterator[tuple[str, int]]:
    """Yield settings that take less memory and train the same, then those in 4 bits: the keys to
    set, and the planned bytes."""
    for bits in dict.fromkeys((config.model.quantization, 4)):
        stored = dataclasses.replace(config.model, quantization=bits)
        quantised = [] if bits == config.model.quantization else [f"model.quantization = {bits}"]
        for division in (1, 2, 4, 8, 16, 32):
            size, rest = divmod(config.arguments.per_device_train_batch_size, division)
            if rest or not size:
                break
            batch = dataclasses.replace(
                config.arguments,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=config.arguments.gradient_accumulation_steps * division,
            )
            divided = (
                []
                if division == 1
                else [
                    f"train.training-arguments.per-device-train-batch-size = {size} with "
                    f"gradient-accumulation-steps = {batch.gradient_accumulation_steps}"
                ]
            )
            for again in dict.fromkeys((checkpointing, True)):
                keys = [*quantised, *divided]
                if again and not checkpointing:
                    keys.append("model.gradient-checkpointing = true")
                changed = dataclasses.replace(config, model=stored, arguments=batch)
                needs = site_needs(changed, checkpointing=again)
                if keys and needs is not None:
                    yield " and ".join(keys), needs.total
