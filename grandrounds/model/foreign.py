"""LoRA adapters that others saved: which are plain, which PEFT itself must load, which are refused.

An `adapter_config.json` is compared with a plain `LoraConfig` as a whole, so that no setting is
overlooked: an untrained PiSSA adapter equals its base only if the base is changed as PiSSA does.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from grandrounds.errors import ModelError, first_line
from grandrounds.model.base import base_config
from grandrounds.model.lora import without_bitsandbytes
from grandrounds.model.targets import keeps_to_the_text

ANY_VALUE = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("megatron_core", "runtime_config", "qalora_group_size", "eva_config", "layers_pattern"),
        "fan_in_fan_out",  # PEFT sets it by the kind of the modules
    )
)
"""Settings that are read elsewhere, or change nothing about a saved adapter."""

STARTS_THAT_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` after which an adapter is A and B on the unchanged base."""

BY_PEFT = frozenset(
    (
        *("bias", "lora_bias", "modules_to_save"),
        *("layers_to_transform", "exclude_modules"),
        *("target_parameters", "trainable_token_indices", "ensure_weight_tying"),
    )
)
"""Settings that PEFT applies while it loads an adapter."""

STARTS_BY_PEFT = ("pissa", "olora")
"""Values of `init_lora_weights` for which PEFT changes the base, from its weights alone."""

REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which acts after its invocation tokens",
    "layer_replication": "an adapter on replicated layers",
    "use_qalora": "a QALoRA adapter",
    "loftq_config": "a LoftQ adapter",
    "corda_config": "a CorDA adapter",
    "lora_ga_config": "a LoRA-GA adapter",
}
"""Setting → what has it and cannot be evaluated."""

ADVICE = (
    "Merge it into its base with PEFT, and evaluate the merged model as the base of target none."
)


def is_plain(config: Mapping[str, Any], folder: Path) -> bool:
    """Return whether an adapter is plain LoRA or DoRA; raise as `beyond_plain`."""
    return not beyond_plain(config, folder)


def beyond_plain(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the settings for which PEFT must load an adapter; none of plain LoRA or DoRA.

    Raises
    ------
    ModelError
        If it is of a kind that cannot be evaluated; the message names the kind.
    """
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise ModelError(f"the adapter {folder} is of PEFT's type {kind}, not LORA. {ADVICE}")
    default = _defaults()
    found = []
    for key, value in config.items():
        if key in ANY_VALUE or value == default.get(key) or not (value or key in default):
            continue
        if key == "init_lora_weights":
            is_beyond = _start_needs_peft(value, folder)
        elif key == "exclude_modules" and keeps_to_the_text(value):
            continue
        elif key in BY_PEFT:
            is_beyond = bool(value)
        elif value:
            what = REFUSED.get(key, f"an adapter with {key} = {str(value)[:40]}")
            raise ModelError(f"{folder} is {what}, which cannot be evaluated here. {ADVICE}")
        else:
            continue
        found += [f"{key} = {str(value)[:40]}"] * is_beyond
    targets = config.get("target_modules")
    by_path = isinstance(targets, list) and any("." in str(target) for target in targets)
    by_default = targets is None and bool(config.get("r"))  # PEFT knows those of the architecture
    if by_path or by_default or isinstance(targets, str):
        found.append(f"target_modules = {str(targets)[:40]}")
    return found


def _start_needs_peft(start: object, folder: Path) -> bool:
    if start in STARTS_THAT_LEAVE_THE_BASE:
        return False
    name = str(start).lower()
    if name in STARTS_BY_PEFT:
        return True
    if name.startswith("pissa_niter_"):
        raise ModelError(
            f"the adapter {folder} was started with init_lora_weights = {start!r}: PEFT "
            "changes the base by a randomised decomposition, another one on every load, so that "
            "its answers would be random. Convert it when it is saved (PEFT's "
            f"path_initial_model_for_weight_conversion), or: {ADVICE[0].lower()}{ADVICE[1:]}"
        )
    raise ModelError(
        f"the adapter {folder} was started with init_lora_weights = {start!r}, which changed its "
        "base from data or from another precision; it is no adapter of the base alone. Convert it "
        "when it is saved (PEFT's path_initial_model_for_weight_conversion), or: "
        f"{ADVICE[0].lower()}{ADVICE[1:]}"
    )


def _defaults() -> dict[str, Any]:
    """Return the settings of a plain LoRA adapter."""
    with without_bitsandbytes():
        from peft import LoraConfig

    plain = LoraConfig()
    return {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file, safetensors or a pickle of tensors alone.

    Raises
    ------
    ModelError
        If the file is damaged, or a pickle that holds anything but tensors.
    """
    if file.suffix == ".safetensors":
        import safetensors.torch

        try:
            # not `load_file`, which takes no path that is not UTF-8
            tensors: dict[str, torch.Tensor] = safetensors.torch.load(file.read_bytes())
            return tensors
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{file} is damaged ({first_line(error)}). Copy it again.") from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise unrelated types
        raise ModelError(
            f"{file} is no file of tensors alone ({first_line(error)}): a pickle can run code, so "
            "nothing else is loaded from one. Save the adapter as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(torch.is_tensor(t) for t in found.values()):
        raise ModelError(f"{file} holds no tensors by name. Save the adapter as safetensors.")
    return found


def load_config(folder: Path) -> Any:
    """Return PEFT's configuration of a saved adapter."""
    with without_bitsandbytes():
        from peft import PeftConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown keys were looked at before
            return PeftConfig.from_pretrained(str(folder))
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"PEFT cannot read {folder} ({first_line(error)}). {ADVICE}") from error


def needed_shapes(folder: Path, base: str, stored: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that PEFT loads for an adapter on a base, without any weights.

    `stored` are the names in its file, which may hold the base's embeddings too.

    Raises
    ------
    ModelError
        If PEFT cannot put such an adapter on the base.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(load_config(folder))
    config.init_lora_weights = False  # needs no weights, and the same tensors
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config(base))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = _adapted(model, config, folder)
    return {name: tuple(tensor.shape) for name, tensor in _saved_names(adapted, stored).items()}


def load_by_peft(model: Any, folder: Path, file: Path) -> Any:
    """Return a freshly loaded base with a saved adapter on it, as PEFT loads it.

    Raises
    ------
    ModelError
        If PEFT fails, or its adapter has other tensors than the file.
    """
    with without_bitsandbytes(needed=bool(getattr(model, "is_quantized", False))):
        from peft import set_peft_model_state_dict

    config = load_config(folder)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = _adapted(model, config, folder)
    tensors = read_weights(file)
    missing = sorted(set(_saved_names(adapted, tensors)) ^ set(tensors))
    if missing:
        raise ModelError(f"{folder}: the tensor {missing[0]} is in the file or the model only.")
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def _adapted(model: Any, config: Any, folder: Path) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the adapter {folder} does not fit the base ({first_line(error)}). Use --base with "
            "the base that it was trained on."
        ) from error


def _saved_names(adapted: Any, stored: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT saves of an adapter, with the embeddings if they are stored."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted)
    ends = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    for path, module in adapted.named_modules():
        name = f"{path}.weight"
        if name in stored and any(module is end for end in ends):
            found[name] = module.weight
    return found
