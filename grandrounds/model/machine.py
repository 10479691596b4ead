"""How this machine trains: precision, batching, threads, and the base with its adapter."""

from __future__ import annotations

from functools import lru_cache

import torch

from grandrounds.config.keys import Config
from grandrounds.errors import ModelError
from grandrounds.model import headroom
from grandrounds.model.architectures import FAMILIES
from grandrounds.model.base import BaseSpec, base_config, device_and_dtype
from grandrounds.model.lora import LoraSpec, base_parameters
from grandrounds.model.loss import Forward
from grandrounds.model.resident import Resident, compile_mlps, resident_model
from grandrounds.wire.adapter import Ranks

SMALL_BASE_PARAMETERS = 5_000_000
"""A smaller base trains with one CPU thread unless configured otherwise."""

_PROCESS_THREADS = torch.get_num_threads()


def specs(config: Config) -> tuple[BaseSpec, LoraSpec]:
    """Return the specifications of the base and of the adapter on it."""
    model, lora = config.model, config.lora
    rank = Ranks.of(config).resident
    alpha = lora.peft_lora_alpha * rank / lora.peft_lora_r
    return (
        BaseSpec(model.name, model.quantization, model.dtype),
        LoraSpec(rank, alpha, lora.target_modules, lora.dropout),
    )


def precision(config: Config) -> str:
    """Describe the number formats of weights and computation on this machine."""
    _, dtype = device_and_dtype(config.model.dtype)
    name = str(dtype).removeprefix("torch.")
    stored = {0: name, 8: "8-bit (LLM.int8)", 4: "4-bit NF4, double quantisation"}
    computed = "multiplied in int8" if config.model.quantization == 8 else f"computed in {name}"
    text = f"base {stored[config.model.quantization]}, {computed}, adapter float32"
    autocast = headroom.device_precision(config).autocast
    return f"{text}, bfloat16 autocast" if autocast else text


@lru_cache(maxsize=4)
def _model_type(name: str) -> str:
    return str(base_config(name).model_type)


def forward(config: Config) -> Forward:
    """Return how batches go through the base on this machine.

    Raises
    ------
    ModelError
        If padding-free batches are requested and the base's attention does not support them.
    """
    train, model_type = config.train, _model_type(config.model.name)
    family = FAMILIES.get(model_type)
    supported = family is not None and not family.attention_matrix
    if train.batching == "padding-free" and not supported:
        raise ModelError(
            f'train.batching = "padding-free": the attention of {model_type!r} models is not known '
            'to support it. Set "length-grouped" or "auto".'
        )
    return Forward(
        bf16=config.arguments.bf16,
        padding_free=supported and train.batching in ("auto", "padding-free"),
        answers_only=train.response_only_logits and family is not None,
        chunk_tokens=train.logits_chunk_tokens,
    )


def means(config: Config) -> str:
    """Describe the optimisations in use on this machine."""
    how = forward(config)
    grouped = "length-grouped" if config.train.batching == "auto" else config.train.batching
    parts = [f"{'padding-free' if how.padding_free else grouped} batches"]
    parts.append(f"logits of {'answers' if how.answers_only else 'all tokens'}")
    if headroom.checkpoints_activations(config):
        parts.append("gradient checkpointing")
    if config.arguments.torch_compile:
        parts.append("compiled MLPs")
    return ", ".join(parts)


def threads(config: Config) -> int:
    """Return the number of CPU threads for visits.

    With `train.num-threads = 0` a small base on a CPU gets one: synchronising threads would take
    longer than its small products.
    """
    if config.train.num_threads:
        return config.train.num_threads
    if torch.cuda.is_available() or base_parameters(config.model.name) >= SMALL_BASE_PARAMETERS:
        return _PROCESS_THREADS
    return 1


def prepare_model(config: Config) -> Resident:
    """Return this process's model, ready for a visit. The first call loads the base."""
    if torch.get_num_threads() != threads(config):
        torch.set_num_threads(threads(config))
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = config.arguments.tf32
        torch.backends.cudnn.allow_tf32 = config.arguments.tf32
        # cuDNN's attention builds a plan for each new shape, and every sequence length is one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with headroom.explaining_out_of_memory(config, headroom.checkpoints_activations(config)):
        resident = resident_model(*specs(config))
    compile_mlps(resident, config.arguments.torch_compile)
    return resident
