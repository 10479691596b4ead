"""How this machine trains: precision, batches, threads, and the base with its adapter."""

from __future__ import annotations

from functools import lru_cache

import torch

from grandrounds.config.keys import Config
from grandrounds.errors import ModelError
from grandrounds.model import headroom as fitting
from grandrounds.model import loss
from grandrounds.model.base import BaseSpec, base_config, device_and_dtype, has_bfloat16
from grandrounds.model.lora import LoraSpec, base_parameters
from grandrounds.model.resident import Resident, compile_mlps, resident_model
from grandrounds.wire.adapter import Ranks

SMALL_BASE_PARAMETERS = 5_000_000
"""Below this a base trains with one CPU thread unless told otherwise."""

_PROCESS_THREADS = torch.get_num_threads()


def specs(config: Config) -> tuple[BaseSpec, LoraSpec]:
    """Return what decides the base and the adapter."""
    model, lora = config.model, config.lora
    rank = Ranks.of(config).resident
    alpha = lora.peft_lora_alpha * rank / lora.peft_lora_r
    return (
        BaseSpec(model.name, model.quantization, model.dtype),
        LoraSpec(rank, alpha, lora.target_modules, lora.dropout),
    )


def precision(config: Config) -> str:
    """Return in words what the base is stored in and computed in on this machine."""
    device, dtype = device_and_dtype(config.model.dtype)
    name = str(dtype).removeprefix("torch.")
    stored = {0: name, 8: "8-bit (LLM.int8)", 4: "4-bit NF4, double quantisation"}
    autocast = config.arguments.bf16 and device.type == "cuda" and has_bfloat16()
    computed = "multiplied in int8" if config.model.quantization == 8 else f"computed in {name}"
    text = f"base {stored[config.model.quantization]}, {computed}, adapter float32"
    return f"{text}, bfloat16 autocast" if autocast else text


@lru_cache(maxsize=4)
def _family(name: str) -> str:
    return str(base_config(name).model_type)


def forward(config: Config) -> loss.Forward:
    """Return how batches go through the base on this machine.

    Raises
    ------
    ModelError
        If batches without padding are asked for, and the base's attention does not allow them.
    """
    train, family = config.train, _family(config.model.name)
    possible = loss.can_skip_padding(family)
    if train.batching == "padding-free" and not possible:
        raise ModelError(
            f'train.batching = "padding-free": attention of {family!r} models is not known to '
            'allow it. Set "length-grouped", or "auto".'
        )
    return loss.Forward(
        bf16=config.arguments.bf16,
        padding_free=possible and train.batching in ("auto", "padding-free"),
        answers_only=train.response_only_logits and loss.has_plain_head(family),
        chunk_tokens=train.logits_chunk_tokens,
    )


def means(config: Config) -> str:
    """Return in words how batches go through the base on this machine."""
    how = forward(config)
    grouped = "length-grouped" if config.train.batching == "auto" else config.train.batching
    parts = [f"{'padding-free' if how.padding_free else grouped} batches"]
    parts.append(f"logits of {'answers' if how.answers_only else 'all tokens'}")
    if fitting.checkpoints_activations(config):
        parts.append("gradient checkpointing")
    if config.arguments.torch_compile:
        parts.append("compiled MLPs")
    return ", ".join(parts)


def threads(config: Config) -> int:
    """Return the CPU threads that visits use.

    Where `train.num-threads` is 0 and the base is small, one: the threads of a small product wait
    for each other longer than they work.
    """
    if config.train.num_threads:
        return config.train.num_threads
    device, _ = device_and_dtype(config.model.dtype)
    is_small = device.type == "cpu" and _parameters(config.model.name) < SMALL_BASE_PARAMETERS
    return 1 if is_small else _PROCESS_THREADS


@lru_cache(maxsize=4)
def _parameters(name: str) -> int:
    return base_parameters(name)


def prepare_model(config: Config) -> Resident:
    """Return this process's model; the base is loaded at the first call only."""
    if torch.get_num_threads() != threads(config):
        torch.set_num_threads(threads(config))
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = config.arguments.tf32
        torch.backends.cudnn.allow_tf32 = config.arguments.tf32
        # cuDNN's attention makes a plan for each new shape, and every sequence is one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with fitting.memory_told(config, fitting.checkpoints_activations(config)):
        resident = resident_model(*specs(config))
    compile_mlps(resident, config.arguments.torch_compile)
    return resident
