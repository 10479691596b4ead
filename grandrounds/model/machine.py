"""How this machine trains: precision, batching, threads, and the base with its adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from grandrounds import waiting
from grandrounds.config.keys import Config
from grandrounds.config.words import counted
from grandrounds.errors import ModelError
from grandrounds.model import headroom, products
from grandrounds.model.architectures import FAMILIES
from grandrounds.model.base import (
    BaseSpec,
    bits_of,
    device_and_dtype,
    stored_bits,
)
from grandrounds.model.devices import processes
from grandrounds.model.lora import LoraSpec, base_parameters
from grandrounds.model.loss import Forward
from grandrounds.model.resident import Resident, compile_mlps, resident_model
from grandrounds.waiting import usable_cpus
from grandrounds.wire.adapter import Ranks
from grandrounds.wire.messages import CPU_MATMUL, THREADS

SMALL_BASE_PARAMETERS = 5_000_000
"""A smaller base trains with one CPU thread unless configured otherwise."""

BUCKET_TOKENS = 256
"""Token totals of padding-free rows on a GPU are multiples of this, of short rows of less."""

_PROCESS_THREADS = torch.get_num_threads()


def specs(config: Config) -> tuple[BaseSpec, LoraSpec]:
    """Return the specifications of the base and of the adapter on it."""
    model = config.model
    adapter = LoraSpec.of(config).at_rank(Ranks.of(config).resident)
    return BaseSpec(model.source, model.quantization, model.dtype), adapter


def precision(config: Config) -> str:
    """Describe the number formats of weights and computation on this machine."""
    _, dtype = device_and_dtype(config.model.dtype)
    name = str(dtype).removeprefix("torch.")
    stored = {0: name, 8: "8-bit (LLM.int8)", 4: "4-bit NF4, double quantisation"}
    bits, published = bits_of(specs(config)[0]), stored_bits(config.model.source)
    computed = "multiplied in int8" if bits == 8 else f"computed in {name}"
    origin = f"{published}-bit as it was published" if published else stored[bits]
    text = f"base {origin}, {computed}, adapter float32"
    if matmul(config) == products.ONEDNN:
        text += ", products by oneDNN"
    autocast = headroom.device_precision(config).autocast
    return f"{text}, bfloat16 autocast" if autocast else text


def forward(config: Config) -> Forward:
    """Return how batches go through the base on this machine.

    Raises
    ------
    ModelError
        If padding-free batches are requested and the base's attention does not support them.
    """
    train, model_type = config.train, headroom.model_type_of(config.model.source)
    family = FAMILIES.get(model_type)
    supported = family is not None and not family.attention_matrix
    if train.batching == "padding-free" and not supported:
        raise ModelError(
            f'train.batching = "padding-free": the attention of {model_type!r} models is not known '
            'to support it. Set "length-grouped" or "auto".'
        )
    padding_free = supported and train.batching in ("auto", "padding-free")
    return Forward(
        bf16=config.arguments.bf16,
        padding_free=padding_free,
        answers_only=train.response_only_logits and family is not None,
        chunk_tokens=train.logits_chunk_tokens,
        matmul=matmul(config),
        bucket_tokens=_bucket_tokens(config) if padding_free else 1,
        fused=bool(headroom.fused_pieces(config)),
    )


def _bucket_tokens(config: Config) -> int:
    """Return to which multiple the tokens of a row are rounded up.

    On a GPU, where the first pass over a new shape costs more. LLM.int8 finds outliers over all
    tokens of a product, so that a tail would change the others' values.
    """
    on_gpu = device_and_dtype(config.model.dtype)[0].type == "cuda"
    return BUCKET_TOKENS if on_gpu and bits_of(specs(config)[0]) != 8 else 1


def means(config: Config) -> str:
    """Describe the optimisations in use on this machine."""
    how = forward(config)
    grouped = "length-grouped" if config.train.batching == "auto" else config.train.batching
    parts = [f"{'padding-free' if how.padding_free else grouped} batches"]
    parts.append(f"logits of {'answers' if how.answers_only else 'all tokens'}")
    if (shares := config.train.devices) > 1:
        parts.append(f"{shares} shares a batch on {counted(processes(config), 'device')}")
    if again := headroom.checkpoints_activations(config):
        parts.append(headroom.checkpointing_text(again).removeprefix("with "))
    if config.arguments.torch_compile:
        parts.append("compiled MLPs")
    if pieces := headroom.fused_pieces(config):
        parts.append(f"fused {', '.join(pieces)}")
    if kept := headroom.kept_layers(config):
        parts.append(f"4-bit weights of {kept} layers kept dequantised")
    return ", ".join(parts)


def threads(config: Config) -> int:
    """Return the number of CPU threads for visits.

    With `train.num-threads = 0` a small base on a CPU gets one: synchronising threads would take
    longer than its small products.
    """
    if config.train.num_threads:
        return config.train.num_threads
    if torch.cuda.is_available() or not _is_small(config.model.source):
        return min(_PROCESS_THREADS, usable_cpus())
    return 1


def _is_small(name: str) -> bool:
    return base_parameters(name) < SMALL_BASE_PARAMETERS


@lru_cache(maxsize=8)
def matmul(config: Config) -> str:
    """Return the library for float32 products on this machine's CPU: `default` or `onednn`.

    Raises
    ------
    ModelError
        If oneDNN is configured, but computes in reduced precision on this CPU.
    """
    device, dtype = device_and_dtype(config.model.dtype)
    asked = config.train.cpu_matmul
    applies = device.type == "cpu" and dtype == torch.float32 and not bits_of(specs(config)[0])
    base = headroom.architecture_of(config.model.source)
    if asked == products.DEFAULT or not applies:
        return products.DEFAULT
    if asked == products.AUTO and (base is None or _is_small(config.model.source)):
        return products.DEFAULT  # synchronising oneDNN's calls would outweigh small products
    sizes = (base.hidden_size, base.intermediate_size) if base else (1024, 1024)
    probe = products.probed(*sizes, threads(config))
    if asked == products.ONEDNN:
        products.require_exact(probe)
        return asked
    return probe.choice


def settled(config: Config, recorded: Mapping[str, Any]) -> Config:
    """Return a configuration with this machine's threads and library of products filled in.

    The bits of an adapter follow both, so they are chosen once, at the roll call.

    Parameters
    ----------
    recorded
        `threads` and `cpu-matmul` of the site's introduction, as the server returns them with each
        message; empty at the first roll call. They are kept unless the configuration names others,
        or this machine has fewer CPUs, or no oneDNN that computes in float32.
    """
    train, count = config.train, recorded.get(THREADS)
    if not train.num_threads and isinstance(count, int) and 1 <= count <= usable_cpus():
        train = dataclasses.replace(train, num_threads=count)
    config = dataclasses.replace(config, train=train)
    train = dataclasses.replace(
        train,
        num_threads=threads(config),
        cpu_matmul=_kept(config, recorded.get(CPU_MATMUL)) or matmul(config),
    )
    return dataclasses.replace(config, train=train)


def _kept(config: Config, library: object) -> str:
    """Return a recorded library, or an empty string if it is not to be kept on this machine."""
    if config.train.cpu_matmul != products.AUTO or library not in products.LIBRARIES:
        return ""
    train = dataclasses.replace(config.train, cpu_matmul=str(library))
    try:
        return matmul(dataclasses.replace(config, train=train))
    except ModelError:  # another processor, whose oneDNN computes in reduced precision
        return ""


@lru_cache(maxsize=1)
def _warn_of_spinning() -> None:
    warnings.warn(
        "PyTorch was loaded before grandrounds, so its idle threads spin, which is slow beside "
        "other busy processes. Import grandrounds first, or set OMP_WAIT_POLICY=PASSIVE.",
        RuntimeWarning,
        stacklevel=3,
    )


def prepare_model(config: Config) -> Resident:
    """Return this process's model, ready for a visit. The first call loads the base."""
    count = threads(config)
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    if count > 1 and waiting.is_too_late() and not torch.cuda.is_available():
        _warn_of_spinning()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = config.arguments.tf32
        torch.backends.cudnn.allow_tf32 = config.arguments.tf32
        # cuDNN's attention builds a plan for each new shape, and every sequence length is one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with headroom.explaining_out_of_memory(config, headroom.checkpoints_activations(config)):
        resident = resident_model(*specs(config))
    compile_mlps(resident, config.arguments.torch_compile)
    return resident
