"""The frozen base, loaded once per process, and the adapter on it, swapped in place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grandrounds.adapter import Adapter, Shapes
from grandrounds.architectures import named_targets
from grandrounds.errors import ModelError
from grandrounds.formulary import BASE_NAME, base_path


@dataclass(frozen=True)
class BaseSpec:
    """Everything that decides what a loaded base is."""

    name: str
    """Hub name, local folder or `formulary`."""
    quantization: int
    """4, 8 or 0 bits."""
    dtype: str
    """`auto`, `float32` or `bfloat16`."""


@dataclass(frozen=True)
class LoraSpec:
    """Everything that decides an adapter's names and shapes."""

    rank: int
    """r."""
    alpha: float
    """The product B A is scaled by alpha / r."""
    target_modules: str
    """Names with commas, `all-linear` or `auto`."""
    dropout: float
    """Dropout before A, in training only."""


@dataclass
class Resident:
    """The base that this process holds, with an adapter on it."""

    base_spec: BaseSpec
    lora_spec: LoraSpec
    model: Any
    """A peft.PeftModel."""
    parameters: dict[str, torch.nn.Parameter]
    """Adapter tensors by the names under which PEFT saves them, in that order."""
    checkpoints_activations: bool = False
    """Whether activations are computed again in the backward pass."""
    compiled: bool = False
    """Whether the MLPs are compiled."""

    @property
    def device(self) -> torch.device:
        """Where the adapter lives, and so where batches go."""
        return next(iter(self.parameters.values())).device


_resident: Resident | None = None
_loads = 0


def base_loads() -> int:
    """Return how often this process has loaded a base model."""
    return _loads


def resident_bytes() -> int:
    """Return the bytes of the weights that this process holds; 0 before a base is loaded."""
    return sum(p.nbytes for p in _resident.model.parameters()) if _resident else 0


def _no_progress_bars() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16 itself, and does not only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of this process and the type to compute in.

    `auto` is bfloat16 on a GPU that has it, else float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if has_bfloat16() else torch.float32
    return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def model_location(name: str) -> str:
    """Return what `from_pretrained` takes: the embedded base's folder, or `name` itself."""
    return str(base_path()) if name == BASE_NAME else name


@contextmanager
def _told_plainly(name: str, what: str) -> Iterator[None]:
    """Turn the many ways in which a hub or a folder can fail into one `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = os.environ.get("HF_HUB_OFFLINE") in (
            "1",
            "true",
            "True",
            "ON",
            "on",
            "YES",
            "yes",
        )
        advice = (
            "The hub is switched off (HF_HUB_OFFLINE): unset it, give a local folder, "
            if offline
            else "Check the name and the network, `hf auth login` for a gated model, give a local "
            "folder, "
        )
        raise ModelError(
            f"The {what} of {name!r} cannot be loaded: {reason} {advice}"
            'or use model.name = "formulary".'
        ) from error


def load_tokenizer(name: str) -> Any:
    """Return the base's tokenizer, with a pad token.

    Raises
    ------
    ModelError
        If it cannot be found, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    with _told_plainly(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model_location(name))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer of {name!r} has no end-of-sequence token to learn.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(name: str) -> Any:
    """Return the base's configuration, without any weights."""
    from transformers import AutoConfig

    _no_progress_bars()
    with _told_plainly(name, "configuration"):
        return AutoConfig.from_pretrained(model_location(name))


def base_fingerprint(name: str) -> str:
    """Return 16 hex digits that tell one base from another without reading its weights.

    Made of the architecture, the tokenizer and the hub's commit; of a local folder, the names and
    sizes of its weight files stand for the commit.
    """
    config = base_config(name)
    facts = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        facts.pop(key, None)
    folder = Path(model_location(name))
    weights = (
        sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))
        if folder.is_dir()
        else getattr(config, "_commit_hash", None)
    )
    vocabulary = load_tokenizer(name).get_vocab()
    text = json.dumps([facts, weights, sorted(vocabulary.items())], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quantization_config(bits: int, compute_dtype: torch.dtype) -> Any:
    """Return bitsandbytes' configuration: NF4 with double quantisation, or LLM.int8; None for 0.

    Dettmers et al., QLoRA (2023), sections 3 and 4; LLM.int8 (2022).

    Raises
    ------
    ModelError
        If this machine has no working bitsandbytes.
    """
    if not bits:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"model.quantization = {bits} needs bitsandbytes, which does not load here "
            f"({error}). Install it (pip install bitsandbytes), or set model.quantization = 0."
        ) from error
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(spec: BaseSpec) -> Any:
    """Load a base model, frozen. Callers want `resident_model`, which loads it once only."""
    global _loads
    from transformers import AutoModelForCausalLM

    _no_progress_bars()
    device, dtype = device_and_dtype(spec.dtype)
    quantized = quantization_config(spec.quantization, dtype)
    with _told_plainly(spec.name, "base model"):
        model = AutoModelForCausalLM.from_pretrained(
            model_location(spec.name),
            dtype=dtype,
            quantization_config=quantized,
            device_map={"": device},
        )
    _loads += 1
    model.requires_grad_(False)
    model.config.use_cache = False
    if spec.quantization == 4 and device.type == "cpu":
        _one_layout_on_cpu(model)
    return model


def _one_layout_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPU inference.

    On CPUs with AVX512-BF16 its evaluation mode (0.49 to 0.50) repacks the weights and computes in
    bfloat16, so that held-out loss and training would be of two different models, and it fails for
    layers narrower than a quantisation block.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def resident_model(base_spec: BaseSpec, lora_spec: LoraSpec) -> Resident:
    """Return this process's model, loading the base only if it is another one than before."""
    global _resident
    if _resident is not None and _resident.base_spec == base_spec:
        if _resident.lora_spec == lora_spec:
            return _resident
        checkpoint_activations(_resident, False)
        compile_mlps(_resident, False)
        base = _resident.model.unload()
        _resident = None  # without its adapter it is no longer what it says
    else:
        _resident = None  # frees the old base before the new one needs the memory
        base = load_base(base_spec)
    model = add_lora(base, lora_spec, base_spec.name)
    _resident = Resident(base_spec, lora_spec, model, adapter_parameters(model))
    return _resident


def checkpoint_activations(resident: Resident, wanted: bool) -> None:
    """Switch gradient checkpointing on or off; it takes effect in training mode only."""
    if wanted == resident.checkpoints_activations:
        return
    base = resident.model.get_base_model()
    # transformers 5.23 renamed it.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if wanted:
        enable = getattr(base, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(base, f"{name}_checkpointing_disable")()
    resident.checkpoints_activations = wanted


def compile_mlps(resident: Resident, wanted: bool) -> None:
    """Compile the MLP of every layer, for batches of any length, or undo it."""
    if wanted == resident.compiled:
        return
    for module in resident.model.modules():
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, torch.nn.Module):
            if wanted:
                mlp.compile(dynamic=True)
            else:
                mlp._compiled_call_impl = None  # as if it had never been compiled
    resident.compiled = wanted


def add_lora(base: Any, spec: LoraSpec, name: str) -> Any:
    """Return the base with a fresh adapter: float32, whatever the base is."""
    from peft import get_peft_model

    return get_peft_model(base, peft_config(spec, linear_targets(base, spec, name)))


def peft_config(spec: LoraSpec, targets: Sequence[str], name: str | None = None) -> Any:
    """Return PEFT's configuration of the adapter; `name` is the base that a saved one names."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=name,
    )


def linear_targets(base: Any, spec: LoraSpec, name: str) -> list[str]:
    """Return the names of the modules to adapt, each of which matches a linear module.

    Raises
    ------
    ModelError
        If a name matches none (the linear modules are listed), or `auto` knows no architecture.
    """
    head = base.get_output_embeddings()
    linear = sorted(
        {
            path.rpartition(".")[2]
            for path, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )
    wanted = spec.target_modules
    if wanted == "auto":
        wanted = "all-linear" if name == BASE_NAME else _peft_choice(base.config.model_type, linear)
    return named_targets(wanted, linear, name)


def _peft_choice(model_type: str, linear: Sequence[str]) -> str:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE

    if model_type not in CHOICE:
        raise ModelError(
            f'model.lora.target-modules = "auto": PEFT has no choice for {model_type!r}. '
            f"Give some of its linear modules: {', '.join(linear)}."
        )
    return ",".join(CHOICE[model_type])


def adapter_layout(name: str, spec: LoraSpec) -> tuple[Shapes, list[str]]:
    """Return the adapter's tensor shapes by name, and its target modules, without any weights.

    The model is built on the meta device from its configuration alone, so a server can do it for a
    base of any size.
    """
    model = _without_weights(name)
    targets = linear_targets(model, spec, name)
    with torch.device("meta"):
        model = add_lora(model, spec, name)
    return {n: tuple(p.shape) for n, p in adapter_parameters(model).items()}, targets


def base_parameters(name: str) -> int:
    """Return how many parameters a base has, without any weights."""
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


@torch.no_grad()
def set_adapter(resident: Resident, adapter: Adapter) -> None:
    """Copy an adapter into the resident model."""
    for name, parameter in resident.parameters.items():
        parameter.copy_(torch.tensor(adapter[name]))


@torch.no_grad()
def adapter_change(resident: Resident, received: Adapter) -> Adapter:
    """Return the resident adapter minus the one received, float32."""
    return {
        name: parameter.detach().float().cpu().numpy() - received[name]
        for name, parameter in resident.parameters.items()
    }
