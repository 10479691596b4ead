"""The frozen base: where its files are, its tokenizer and configuration, and how it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import ModelError, first_line


@dataclass(frozen=True)
class BaseSpec:
    """Everything that decides what a loaded base is."""

    name: str
    """Hub name, local folder or `formulary`."""
    quantization: int
    """4, 8 or 0 bits."""
    dtype: str
    """`auto`, `float32` or `bfloat16`."""


_loads = 0


def base_loads() -> int:
    """Return how often this process has loaded a base model."""
    return _loads


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
    return str(base_path()) if name == FORMULARY else name


@contextmanager
def _told_plainly(name: str, what: str) -> Iterator[None]:
    """Turn the many ways in which a hub or a folder can fail into one `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error, most=None)  # uncut: a site redacts whole paths only
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
            f"The {what} of {name!r} cannot be loaded: {reason}. {advice}"
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
