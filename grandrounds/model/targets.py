"""Which modules of a base an adapter is put on, and which stay frozen under `all-linear`.

A module is adapted if the text passes through it and PEFT computes the right thing with it: a
product with its weight, read by calling the module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Linear, Module

from grandrounds.config.values import words_of
from grandrounds.errors import ModelError
from grandrounds.model.architectures import choose_targets

UNREAD = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    "jamba": ("dt_proj",),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), ("out_proj",)),
    **dict.fromkeys(("bamba", "granitemoehybrid", "zamba2"), ("out_proj",)),
}
"""Model type → linear modules of its state-space layers whose weights the kernels read directly,
past any adapter (transformers 5.18 to 5.24; PEFT 0.21 refuses most of them)."""

_NOT_IN, _ANYTHING = "(?!", ").*"


@dataclass(frozen=True)
class Targets:
    """The modules of a base that an adapter is put on."""

    modules: tuple[str, ...]
    """Last parts of their paths."""
    excluded: str | None = None
    """Regular expression of the paths that are left out: everything outside the text model of a
    composite base. None: nothing is."""
    transposed: bool = False
    """Whether they are Conv1D, which stores (in-features, out-features)."""
    frozen: tuple[str, ...] = ()
    """What `all-linear` leaves out and a reader would expect: fused experts, routers, state-space
    projections."""

    def adapt(self, path: str) -> bool:
        """Whether the module at a path of the base is adapted."""
        outside = self.excluded is not None and re.fullmatch(self.excluded, path)
        return path.rpartition(".")[2] in self.modules and not outside


def find_targets(base: Any, wanted: str, name: str) -> Targets:
    """Return the modules of a base to adapt.

    Parameters
    ----------
    wanted : str
        `model.lora.target-modules`: comma-separated names, `all-linear` or `auto`.
    name : str
        Name of the base, for errors.

    Raises
    ------
    ModelError
        If a name matches no linear module or one that cannot be adapted, or PEFT has no default for
        the architecture.
    """
    text, prefix = text_model(base)
    by_name = _by_name(text, base.get_output_embeddings())
    linear = sorted(n for n, modules in by_name.items() if all(map(_is_linear, modules)))
    model_type = base.config.get_text_config().model_type
    unfit = dict(_unfit(base, by_name, linear))
    fit = [n for n in linear if n not in unfit]
    for target in (word.removesuffix("?") for word in words_of(wanted)):
        if target in unfit:
            raise ModelError(
                f"model.lora.target-modules names {target!r}, which an adapter on {name!r} cannot "
                f"use: {unfit[target]}. Modules that it can adapt: {', '.join(fit)}."
            )
    modules = choose_targets(wanted, fit, name, model_type, _defaults(base, fit))
    experts = sorted(set(_fused(text)))
    return Targets(
        modules=tuple(modules),
        excluded=_outside(base, prefix, modules),
        transposed=all(is_conv1d(m) for target in modules for m in by_name[target]),
        frozen=tuple(sorted(unfit) + experts) if wanted == "all-linear" else (),
    )


def text_model(base: Any) -> tuple[Any, str]:
    """Return the part of a base that text passes through, and its path; a composite's decoder."""
    if base.config.get_text_config() is base.config:
        return base, ""
    path = decoder_path(base)
    return base.get_submodule(path), path


def decoder_path(base: Any) -> str:
    """Return the path of a base's text decoder; empty if it is the whole model."""
    decoder = base.get_decoder()
    return next((path for path, module in base.named_modules() if module is decoder), "")


def _by_name(text: Any, head: Module | None) -> dict[str, list[Module]]:
    """Return all modules by the last part of their path, of the names that have a linear one."""
    found: dict[str, list[Module]] = {}
    for path, module in text.named_modules():
        if module is not head:
            found.setdefault(path.rpartition(".")[2], []).append(module)
    return {
        name: modules
        for name, modules in found.items()
        if any(isinstance(m, Linear) or is_conv1d(m) for m in modules)
    }


def is_conv1d(module: Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_linear(module: Module) -> bool:
    """Whether a module returns a product with its weight and nothing else.

    Some routers are subclasses of `Linear` that return the chosen experts too.
    """
    is_product = isinstance(module, Linear) and "Router" not in type(module).__name__
    return is_product or is_conv1d(module)


def _unfit(
    base: Any, by_name: dict[str, list[Module]], linear: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the linear modules that cannot be adapted, each with the reason."""
    model_type = base.config.get_text_config().model_type
    for name in by_name:
        if name not in linear:
            yield name, "its output is more than a product with its weight"
        elif name in UNREAD.get(model_type, ()):
            yield name, "the kernels of its layer read the weight past an adapter"
        elif _becomes_experts(base, name):
            yield name, "PEFT takes the name for the fused experts of the layers"


def _becomes_experts(base: Any, name: str) -> bool:
    """Whether PEFT replaces a target by the fused experts of the model, at another rank.

    It does so for adapters made before transformers fused them; modules of this name in dense
    layers and shared experts are then passed over.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=base, conversions=None)
    except ValueError:  # half of a fused pair
        return True
    return name not in config.target_modules


def expert_modules(base: Any) -> list[str]:
    """Return the experts and routers of a base, by module; empty for a dense one."""
    text, _ = text_model(base)
    named = (
        path
        for path, module in text.named_modules()
        if path.rpartition(".")[2] in ("experts", "router", "block_sparse_moe")
        or "Router" in type(module).__name__
    )
    return sorted({path.rpartition(".")[2] for path in named} | set(_fused(text)))


def _fused(text: Any) -> Iterator[str]:
    """Yield the stacks of expert weights, (experts, ., .), by module and parameter."""
    for path, module in text.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.dim() == 3 and min(tensor.shape[1:]) > 1:
                yield f"{path.rpartition('.')[2]}.{parameter}"


def _defaults(base: Any, linear: Sequence[str]) -> list[str] | None:
    """Return PEFT's default target modules; for a composite base those of its text model."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE

    own = CHOICE.get(base.config.model_type)
    choice = own or CHOICE.get(base.config.get_text_config().model_type)
    if not isinstance(choice, str):
        return choice  # type: ignore[no-any-return]
    paths = (path for path, _ in base.named_modules() if re.fullmatch(choice, path))
    return sorted({path.rpartition(".")[2] for path in paths} & set(linear))


def _outside(base: Any, prefix: str, modules: Sequence[str]) -> str | None:
    """Return the expression of all paths outside the text model, if a target lies there."""
    if not prefix:
        return None
    inside = prefix + "."
    outside = (path for path, _ in base.named_modules() if not path.startswith(inside))
    if not any(path.rpartition(".")[2] in modules for path in outside):
        return None
    return f"{_NOT_IN}{re.escape(inside)}{_ANYTHING}"


def keeps_to_the_text(excluded: object) -> bool:
    """Whether a saved adapter's `exclude_modules` is that of an adapter on a composite's text."""
    text = str(excluded)
    return text.startswith(_NOT_IN) and text.endswith(_ANYTHING)
