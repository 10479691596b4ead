"""Whether a visit fits into this machine's memory: planned bytes against free bytes.

Checked before training for `model.gradient-checkpointing = "auto"`, which recomputes the
activations of as few layers as fit, and after running out of memory to report settings that would
fit.
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
from grandrounds.model import fused
from grandrounds.model.architectures import FAMILIES, Architecture, from_config, target_modules
from grandrounds.model.base import (
    base_config,
    device_and_dtype,
    has_bfloat16,
    is_out_of_memory,
    stored_bits,
)
from grandrounds.model.devices import processes
from grandrounds.model.memory import (
    MIB,
    Checkpointing,
    Precision,
    SiteMemory,
    share_size,
    site_memory,
)
from grandrounds.model.resident import (
    Resident,
    checkpoint_activations,
    keep_weights,
    resident_bytes,
)

GIB = 2**30

HEADROOM = 0.92
"""Share of the free memory that a plan may fill: allocators lose some to fragmentation, and the
plan is an estimate."""

GPU_SHARE = "GRANDROUNDS_GPU_SHARE"
"""Environment variable: share of a GPU that one process may fill when several use it."""

Result = TypeVar("Result")

_settled: dict[Config, Checkpointing] = {}
"""Configuration with `auto` → which layers of a visit recompute their activations."""

_kept: dict[Config, int] = {}
"""Configuration → first layers whose 4-bit weights a visit keeps dequantised."""


@lru_cache(maxsize=4)
def architecture_of(name: str) -> Architecture | None:
    """Return the shapes of a base from its own configuration, or None for an unknown family."""
    described = base_config(name)
    if described.model_type not in FAMILIES:
        return None
    return from_config(name, described.to_dict(), name)


@lru_cache(maxsize=4)
def model_type_of(name: str) -> str:
    """Return the `model_type` of a base's configuration."""
    return str(base_config(name).model_type)


@lru_cache(maxsize=4)
def can_checkpoint(name: str) -> bool:
    """Whether transformers' model of a base supports gradient checkpointing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config(name)), None)
    return bool(getattr(model, "supports_gradient_checkpointing", True))


def fused_pieces(config: Config) -> tuple[str, ...]:
    """Return what fused kernels compute in a visit on this machine, unless their proof fails.

    None in a private visit, which takes gradients apart in PEFT's own modules, none where the MLPs
    are compiled, and none with 8 bits.
    """
    off = config.train.fused_kernels == "off" or config.arguments.torch_compile
    bits = stored_bits(config.model.source) or config.model.quantization
    if off or config.is_private or bits == 8:
        return ()
    return fused.pieces_of(model_type_of(config.model.source))


def device_precision(config: Config) -> Precision:
    """Return the precision of a visit on this machine."""
    device, dtype = device_and_dtype(config.model.dtype)
    autocast = config.arguments.bf16 and has_bfloat16()
    bits = stored_bits(config.model.source) or config.model.quantization
    grouped = device.type == "cuda" and (autocast or dtype.itemsize == 2)
    pieces = frozenset(fused_pieces(config))
    return Precision(bits, dtype.itemsize, autocast, grouped, pieces)


def site_needs(
    config: Config, *, checkpointing: Checkpointing, kept_layers: int = 0
) -> SiteMemory | None:
    """Return the planned memory of a visit on this machine, or None for an unknown family.

    The CUDA context is left out: it is already allocated when free memory is measured.
    `kept_layers` is as in `site_memory`.
    """
    base = architecture_of(config.model.source)
    if base is None:
        return None
    targets = target_modules(base, config.lora.target_modules)
    needs = site_memory(
        config,
        base,
        targets,
        device_precision(config),
        checkpointing=checkpointing,
        kept_layers=kept_layers,
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


def checkpoints_activations(config: Config) -> Checkpointing:
    """Return which layers of a visit recompute their activations: True for all, False for none, or
    the number of first layers.

    `auto` is decided once per configuration: as few as fit into the free memory by the plan; all if
    there is no plan for the base's family; none if the base does not support it.

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
    if config not in _settled:
        _settled[config] = _fewest(config)
    return _settled[config]


def decide_again() -> None:
    """Forget what was decided by the memory that was free; the next visit decides anew."""
    _settled.clear()
    _kept.clear()


def _fewest(config: Config) -> Checkpointing:
    """Return the fewest layers to checkpoint so that a visit fits; all of them if none do."""
    base, room = architecture_of(config.model.source), HEADROOM * _free_for(config)
    for layers in range(base.num_layers if base else 0):
        needs = site_needs(config, checkpointing=layers)
        if needs is not None and needs.total <= room:
            return layers or False
    return True


def kept_layers(config: Config) -> int:
    """Return the number of first layers whose 4-bit weights a visit keeps dequantised.

    Dequantising a weight at each use takes Python longer to start than a GPU to compute. As many as
    fit beside all activations; none where the fused modules that read them are not used. Decided
    once per configuration. The values are those of dequantising at each use.
    """
    if config not in _kept:
        _kept[config] = _most_kept(config)
    return _kept[config]


def _most_kept(config: Config) -> int:
    base, room = architecture_of(config.model.source), HEADROOM * _free_for(config)
    is_read = fused.LORA in fused_pieces(config)
    four_bits = device_precision(config).quantization == 4
    if base is None or not is_read or not four_bits or checkpoints_activations(config):
        return 0
    for layers in range(base.num_layers, 0, -1):
        needs = site_needs(config, checkpointing=False, kept_layers=layers)
        if needs is not None and needs.total <= room:
            return layers
    return 0


def visit_needs(config: Config) -> SiteMemory | None:
    """Return the planned memory of a visit as it is run on this machine; see `site_needs`."""
    return site_needs(
        config,
        checkpointing=checkpoints_activations(config),
        kept_layers=kept_layers(config),
    )


def more_layers(config: Config, checkpointing: Checkpointing) -> Checkpointing:
    """Return more layers to checkpoint after memory ran out: half of the rest, but at least a
    quarter of all, so that a visit is repeated three times at most."""
    base = architecture_of(config.model.source)
    if base is None:
        return True
    rest = base.num_layers - int(checkpointing)
    layers = int(checkpointing) + max(-(-rest // 2), -(-base.num_layers // 4))
    return layers if layers < base.num_layers else True


def checkpointing_text(checkpointing: Checkpointing) -> str:
    """Return how activations are checkpointed, as said in messages."""
    if isinstance(checkpointing, bool):
        return f"{'with' if checkpointing else 'without'} gradient checkpointing"
    return f"with gradient checkpointing of {checkpointing} layers"


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
    how = checkpointing_text(checkpointing)
    raise ModelError(
        f"A visit does not fit into memory: it needs {size_text(needs.total)} {how}, "
        f"of which {size_text(needs.base)} for the base and "
        f"{size_text(needs.activations)} for activations; {size_text(free)} available. "
        f"{_what_fits(config, checkpointing, needs, free)}"
    )


def run_visit(config: Config, resident: Resident, visit: Callable[[], Result]) -> Result:
    """Run a visit with as much gradient checkpointing as is configured, or needed.

    If memory runs out, the visit restarts without kept weights, and then under `auto` with more
    layers checkpointed, and so do later visits. The result is the same.

    Raises
    ------
    ModelError
        If memory runs out; the message gives the plan and settings that would fit.
    """
    checkpointing, kept = checkpoints_activations(config), kept_layers(config)
    is_auto = config.model.gradient_checkpointing == "auto" and can_checkpoint(config.model.source)
    while kept or (is_auto and checkpointing is not True):
        received = [p.detach().clone() for p in resident.parameters.values()]
        try:
            _arrange(config, resident, checkpointing, kept)
            return visit()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if kept:
            kept = _kept[config] = 0
        else:
            checkpointing = _settled[config] = more_layers(config, checkpointing)
        with torch.no_grad():
            for parameter, before in zip(resident.parameters.values(), received, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        keep_weights(resident, 0, config.arguments.bf16)
        _free_unused()
    with explaining_out_of_memory(config, checkpointing):
        _arrange(config, resident, checkpointing, kept)
        return visit()


def _arrange(config: Config, resident: Resident, checkpointing: Checkpointing, kept: int) -> None:
    checkpoint_activations(resident, checkpointing)
    keep_weights(resident, kept, config.arguments.bf16)


def _free_unused() -> None:
    """Release the memory of a failed visit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explaining_out_of_memory(config: Config, checkpointing: Checkpointing) -> Iterator[None]:
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


def _shortage(config: Config, checkpointing: Checkpointing, free: int, reason: str) -> str:
    """Return the message for running out of memory; `free` is what was available before."""
    what = "a batch" if config.train.devices == 1 else "a device's share"
    batch = f"{what} of {share_size(config)} x {config.train.seq_length} tokens"
    how = checkpointing_text(checkpointing)
    text = f"Memory ran out on {batch} {how} ({reason}). "
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


def _what_fits(config: Config, checkpointing: Checkpointing, needs: SiteMemory, free: int) -> str:
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


def smaller_settings(config: Config, checkpointing: Checkpointing) -> Iterator[tuple[str, int]]:
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
