"""The frozen base: its location, tokenizer and configuration, and loading it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from grandrounds.config.bases import find_base, hub_name
from grandrounds.config.words import command
from grandrounds.data.formulary import FORMULARY, base_path
from grandrounds.errors import ModelError, first_line


@dataclass(frozen=True)
class BaseSpec:
    """Everything that determines a loaded base."""

    name: str
    """Hub name (`NAME@REVISION` for a revision), local folder, name of a base on this machine or
    `formulary`."""
    quantization: int
    """Bits: 4, 8, or 0 for none."""
    dtype: str
    """`auto`, `float32` or `bfloat16`."""


_LOADING_FAILS = (
    *(OSError, ValueError, KeyError, RuntimeError, ImportError, UnpicklingError),
    *(SafetensorError, AttributeError, TypeError),
)
"""What the readers of a base raise: a missing file, a foreign layout, a package that is not
installed, a pickle that holds more than tensors."""

_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
"""Texts of out-of-memory errors other than `torch.OutOfMemoryError`."""

_loads = 0


def base_loads() -> int:
    """Return the number of base models that this process has loaded."""
    return _loads


def no_progress_bars() -> None:
    """Keep the bars and warnings of transformers off the terminal."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def has_bfloat16() -> bool:
    """Whether there is a GPU with native bfloat16, not emulated."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast if requested and supported by the GPU, else a null context."""
    if bf16 and device.type == "cuda" and has_bfloat16():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return this process's device and the type to compute in.

    `auto` is bfloat16 on a GPU that supports it, else float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if has_bfloat16() else torch.float32
    return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def model_location(source: str) -> str:
    """Return the argument of `from_pretrained`: a base's folder, or its name on the hub.

    Raises
    ------
    ModelError
        If `source` is a known base that has not been fetched.
    """
    name, _ = hub_name(source)
    return str(base_path() if name == FORMULARY else find_base(name) or name)


def loading(source: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a base: its revision, and never its own code."""
    _, revision = hub_name(source)
    return {"trust_remote_code": False, **({"revision": revision} if revision else {})}


def _in_safetensors(source: str) -> dict[str, bool]:
    """Return the argument that reads a folder's safetensors where it has pickles too."""
    folder = Path(model_location(source))
    return {"use_safetensors": True} if any(folder.glob("*.safetensors")) else {}


def base_commit(source: str) -> str:
    """Return the commit of a base that was read from the hub, as its cache tells it; else empty."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = hub_name(source)
    where = model_location(source)
    if where != name or Path(where).exists():
        return ""
    file = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(file).parent.name if isinstance(file, str) else ""


@contextmanager
def _model_errors(name: str, what: str) -> Iterator[None]:
    """Raise any failure of the hub or a folder as a `ModelError`, but not a lack of memory."""
    try:
        yield
    except _LOADING_FAILS as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, UnpicklingError):  # PyTorch's own text advises to run the code
            raise ModelError(
                f"The {what} of {name!r} cannot be loaded: its weights are a pickle that holds "
                "more than tensors, and could run code. Use a copy in safetensors."
            ) from error
        if "`tiktoken` is required" in str(error):  # what transformers tries after sentencepiece
            raise ModelError(
                f"The {what} of {name!r} is a tokenizer.model alone, which needs sentencepiece in "
                "a version for the installed protobuf: pip install 'grandrounds[sentencepiece]'."
            ) from error
        if "contains custom code" in str(error):
            raise ModelError(
                f"The {what} of {name!r} cannot be loaded: it needs code that comes with it "
                "(auto_map in its files), and no such code is run here. Use a base whose "
                "architecture transformers has."
            ) from error
        reason = first_line(error, most=None)  # uncut: a site redacts whole paths only
        raise ModelError(
            f"The {what} of {name!r} cannot be loaded: {reason.rstrip('.')}. {_advice(name)}, or "
            'use model.name = "formulary".'
        ) from error


def _advice(name: str) -> str:
    """Return what to do where a base cannot be loaded for any other reason."""
    if Path(name).is_dir():
        return "Check the files of this folder, copy it again"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    repository, revision = hub_name(name)
    download = command(
        "hf", "download", repository, *(("--revision", revision) if revision else ())
    )
    hub = (
        f"The hub is disabled (HF_HUB_OFFLINE): unset it, download the base before ({download})"
        if offline
        else "Check the name and the network, run `hf auth login` for a gated model"
    )
    return f"{hub}, give a local folder"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or main memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def load_tokenizer(name: str) -> Any:
    """Return the base's tokenizer.

    Without a pad token, or with one that the model has no embedding for, it pads with
    end-of-sequence. No code that comes with a base is run, here or elsewhere.

    Raises
    ------
    ModelError
        If it cannot be loaded, or has no end-of-sequence token that the model knows.
    """
    from transformers import AutoTokenizer

    with _model_errors(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model_location(name), **loading(name))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer of {name!r} has no end-of-sequence token to train on.")
    pad, vocabulary = tokenizer.pad_token_id, base_config(name).get_text_config().vocab_size
    if tokenizer.eos_token_id >= vocabulary:
        raise ModelError(
            f"The tokenizer of {name!r} does not belong to its model: its end-of-sequence token "
            f"has id {tokenizer.eos_token_id}, and there are {vocabulary:,} embeddings."
        )
    if pad is None or pad >= vocabulary:  # masked, so that any token of the model will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(name: str) -> Any:
    """Return the base's configuration, without its weights."""
    from transformers import AutoConfig

    no_progress_bars()
    with _model_errors(name, "configuration"):
        return AutoConfig.from_pretrained(model_location(name), **loading(name))


@lru_cache(maxsize=8)
def stored_bits(name: str) -> int:
    """Return the bits of a base that was published quantised by bitsandbytes; 0 for any other.

    Raises
    ------
    ModelError
        If it was quantised by another method.
    """
    config = base_config(name)
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if not given:
            continue
        how = given if isinstance(given, dict) else given.to_dict()
        method = str(how.get("quant_method", "an unnamed method"))
        bits = 4 if how.get("load_in_4bit") or how.get("_load_in_4bit") else 8
        if method.removesuffix("_4bit").removesuffix("_8bit") != "bitsandbytes":
            raise ModelError(
                f"The weights of {name!r} are stored quantised by {method}, on which no adapter "
                "was ever trained here. Use a copy in float32, float16 or bfloat16, which "
                "model.quantization = 4 or 8 quantises, or one that bitsandbytes quantised."
            )
        return bits
    return 0


def bits_of(spec: BaseSpec) -> int:
    """Return the bits of a loaded base's weights: as stored, as configured, or 0.

    Raises
    ------
    ModelError
        If they are stored in other bits than `model.quantization` asks for, or by another method
        than bitsandbytes.
    """
    stored = stored_bits(spec.name)
    if stored and spec.quantization not in (0, stored):
        raise ModelError(
            f"model.quantization = {spec.quantization}, and the weights of {spec.name!r} are "
            f"stored in {stored} bits. Set it to {stored} or 0, and they are loaded as they are."
        )
    return stored or spec.quantization


def base_fingerprint(name: str) -> str:
    """Return 16 hex digits that identify a base without reading its weights.

    They cover the architecture, the tokenizer and the hub's commit, or for a local folder the names
    and sizes of its weight files.
    """
    config = base_config(name)
    architecture = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        architecture.pop(key, None)
    folder = Path(model_location(name))
    weights = (
        sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))
        if folder.is_dir()
        else getattr(config, "_commit_hash", None)
    )
    vocabulary = load_tokenizer(name).get_vocab()
    parts = [architecture, weights, sorted(vocabulary.items())]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quantization_config(bits: int, compute_dtype: torch.dtype) -> Any:
    """Return the configuration of NF4 with double quantisation (Dettmers et al., QLoRA, 2023,
    sections 3 and 4) or LLM.int8 (Dettmers et al., 2022); None for 0 bits.

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
            f"model.quantization = {bits} needs bitsandbytes, which cannot be imported ({error}). "
            "Install it (pip install bitsandbytes), or set model.quantization = 0."
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


def _model_class(name: str, whole: bool) -> Any:
    import transformers

    config = base_config(name)
    is_composite = config.get_text_config() is not config
    named = (getattr(config, "architectures", None) or [""])[0]
    own = getattr(transformers, named, None) if whole and is_composite else None
    return own or transformers.AutoModelForCausalLM


def _check_complete(name: str, model: Any, found: Mapping[str, Any]) -> None:
    """Raise `ModelError` if parameters of a model were not in its files, or of other shapes.

    `found` is transformers' loading report.
    """
    for path, stored, needed in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"The files of {name!r} do not fit its config.json: {path} has the shape "
            f"{list(stored)}, and the model needs {list(needed)}. Copy both from one place."
        )
    learned = {path for path, _ in model.named_parameters()}
    lacking = sorted(learned.intersection(found["missing_keys"]))
    if lacking:
        more = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
        raise ModelError(
            f"The files of {name!r} are no whole language model: they lack {len(lacking):,} of its "
            f"{len(learned):,} tensors ({', '.join(lacking[:3])}{more}), which would be random. "
            "Copy it again, or use a base that was saved as a causal language model."
        )


def load_base(spec: BaseSpec, *, whole: bool = False) -> Any:
    """Load a base model and freeze it. `resident_model` loads it only once per process.

    Parameters
    ----------
    whole : bool
        Whether to load every part of a composite checkpoint. transformers' causal language model of
        some (Llama 4, Qwen 3.5) is the text model alone.

    Raises
    ------
    ModelError
        If it cannot be loaded, or its files lack weights: transformers would draw them at random.
    """
    global _loads

    no_progress_bars()
    device, dtype = device_and_dtype(spec.dtype)
    bits = bits_of(spec)
    how = {"quantization_config": quantization_config(bits, dtype)}
    if stored_bits(spec.name):
        how = {}  # what is stored says how, and None would overwrite it
    with _model_errors(spec.name, "base model"):
        model, found = _model_class(spec.name, whole).from_pretrained(
            model_location(spec.name),
            **loading(spec.name),
            **_in_safetensors(spec.name),
            dtype=dtype,
            **how,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    _check_complete(spec.name, model, found)
    _loads += 1
    model.requires_grad_(False)
    model.config.get_text_config().use_cache = False
    if bits == 4 and device.type == "cuda":
        say_uneven(model)
    if bits == 4 and device.type == "cpu":
        # On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks 4-bit weights in evaluation
        # mode and computes in bfloat16: held-out loss would differ from training, and layers
        # narrower than a quantisation block fail.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def say_uneven(model: Any) -> None:
    """Print that 4-bit modules are slow whose inputs are no multiple of a block of their weights.

    bitsandbytes (0.50) warns of it in each module's forward.
    """
    uneven = {
        module.in_features
        for module in model.modules()
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None
        and module.in_features % state.blocksize
    }
    if uneven:
        widths = ", ".join(map(str, sorted(uneven)))
        print(
            f"grandrounds: inputs of {widths} are no multiple of NF4's blocks of 64 weights; "
            "bitsandbytes computes such modules more slowly. Results are the same.",
            file=sys.stderr,
        )
        warnings.filterwarnings("ignore", r"inner dimension .* is not aligned", UserWarning)
