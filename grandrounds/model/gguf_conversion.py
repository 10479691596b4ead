"""Conversion of a GGUF file into a folder that transformers loads like any other base.

Weights are dequantised and stored in bfloat16. Files that could differ between machines (versions,
paths) are cleaned, so that the same file gives the same folder, and the same hash at every site.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grandrounds.errors import ModelError, first_line
from grandrounds.model.base import no_progress_bars
from grandrounds.model.gguf_header import GgufHeader, read_header
from grandrounds.model.headroom import free_bytes, size_text

_BYTES_PER_PARAMETER = 4
"""Peak memory of a conversion: the weights in bfloat16, once as read and once in the model."""

_OF_THIS_MACHINE = (
    *("_name_or_path", "_model_name_or_path", "transformers_version"),
    *("is_local", "local_files_only"),
)
"""Keys of saved configurations that describe the conversion and not the model."""


def check_gguf(file: Path) -> GgufHeader:
    """Return the header of a GGUF file that can be converted on this machine.

    Raises
    ------
    ModelError
        If the file is damaged, not of one language model, or too large for this machine's memory;
        or the package `gguf` is missing.
    """
    header = read_header(file)
    architecture = header.architecture
    if not architecture:
        raise ModelError(f"{file} does not state its architecture (general.architecture).")
    layers = header.values.get(f"{architecture}.block_count")
    if type(layers) is not int or not 1 <= layers <= len(header.tensors):
        raise ModelError(
            f"{file} states {layers!r} layers ({architecture}.block_count) and has "
            f"{len(header.tensors)} tensors: it is not a whole language model."
        )
    _check_data(file, header)
    needed, free = _BYTES_PER_PARAMETER * header.parameters, free_bytes()
    if needed > free:
        raise ModelError(
            f"Converting {file} takes about {size_text(needed)} of memory, and {size_text(free)} "
            "are free. Convert it on a larger machine, and copy the folder."
        )
    return header


def _check_data(file: Path, header: GgufHeader) -> None:
    """Raise `ModelError` if a tensor does not lie in the file, or is of an unknown type."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise ModelError(
            f"Reading {file.name} needs the package gguf, which is not installed: "
            'pip install "grandrounds[gguf]"'
        ) from error
    for tensor in header.tensors:
        try:
            values, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"{file}: the tensor {tensor.name!r} is stored as type {tensor.type}, which the "
                "installed gguf does not know. Upgrade it, or use another quantisation."
            ) from error
        end = header.data_offset + tensor.offset + -(-tensor.values // values) * size
        if end > header.file_bytes:
            raise ModelError(
                f"{file} is damaged or incomplete: it has {header.file_bytes:,} bytes, and the "
                f"tensor {tensor.name!r} ends at {end:,}. Obtain it again."
            )


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into an existing folder.

    Raises
    ------
    ModelError
        If transformers does not read the architecture, or tensors are missing or not finite.
    """
    header = check_gguf(file)
    model, tokenizer = _load(file, header)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{file} is damaged: {name} holds values that are not numbers.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in _OF_THIS_MACHINE}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load(file: Path, header: GgufHeader) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    no_progress_bars()
    where = {"gguf_file": "model.gguf", "local_files_only": True}
    try:
        # transformers shows bars that no setting turns off
        with _alone(file) as folder, _read_once(), contextlib.redirect_stderr(io.StringIO()):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                **where,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    except Exception as error:  # the readers of a file from anywhere raise anything
        raise ModelError(
            f"{file} cannot be converted: {first_line(error)} ({type(error).__name__}). "
            f"Its architecture is {header.architecture!r}; transformers must read it as a causal "
            "language model."
        ) from error
    _check_whole(file, model, found)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{file}: its tokenizer has no end-of-sequence token to train on.")
    return model, tokenizer


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[str]:
    """Yield a folder with the file alone, as model.gguf.

    transformers also reads what lies beside it, and follows an adapter_config.json to its base.
    """
    with tempfile.TemporaryDirectory(prefix="grandrounds-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(file.absolute())
        yield folder


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Remember what the package `gguf` has read, while transformers loads one file.

    transformers reads the file anew for the configuration, the weights and the tokenizer, and
    builds the table of tensor names once for each module: two thirds of a conversion's time.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.cache(each) for each in originals)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def _check_whole(file: Path, model: Any, found: Any) -> None:
    """Raise `ModelError` if a tensor was missing or of another shape than the model's."""
    from transformers import AutoModelForCausalLM

    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{file} is not a whole model: {len(missing)} tensors are missing, the first being "
            f"{missing[0]}."
        )
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(model.config)
    for name, tensor in described.state_dict().items():
        if tensor.shape != model.state_dict()[name].shape:
            raise ModelError(
                f"{file} is damaged: {name} has the shape {list(model.state_dict()[name].shape)}, "
                f"and its configuration says {list(tensor.shape)}."
            )
