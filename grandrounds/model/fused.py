"""Fused kernels on a GPU: which pieces of a base they compute, proved before they are used.

Python starts a kernel in about 5 microseconds, and a layer of Llama starts hundreds a step; on a
large card that takes longer than the kernels. Liger's Triton kernels (Hsu et al., 2024, section 3)
compute a norm, an activation with its product, or RoPE in one launch each; `lora_linear` does so
for an adapted module. They stand in within a context, for one model, and are gone after it.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from grandrounds.errors import first_line
from grandrounds.model.base import is_out_of_memory
from grandrounds.model.layer_proof import (
    MORE_DRAWS,
    Draws,
    drawn_factors,
    excess_of,
    mean,
    one_layer,
    set_values,
)
from grandrounds.model.lora_linear import Factors, Frozen, lora_forwards

NORM, MLP, ROPE, LORA = "norm", "MLP", "RoPE", "LoRA"
PIECES = (LORA, NORM, MLP, ROPE)
"""What a fused kernel may compute, in the order in which they are proved."""

OF_LIGER = (NORM, MLP, ROPE)


@dataclass(frozen=True)
class Family:
    """How Liger's kernels compute the pieces of one `model_type`."""

    casting: str = "llama"
    """Where its norm rounds: `llama` before the weight, `gemma` after it."""
    offset: float = 0.0
    """What its norm adds to the weight."""
    activations: tuple[str, ...] = ("silu", "swish")
    """Activations of the MLP that the kernel computes."""


_LLAMA, _GEMMA = Family(), Family("gemma", 1.0, ("gelu_pytorch_tanh",))

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"), _LLAMA),
    "olmo2": Family("gemma"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
}
"""`model_type` → kernels, for text models that Liger patches itself (`apply_liger_kernel_to_*` of
liger-kernel 0.8.5, monkey_patch.py). OLMo 2's norm rounds after the weight in transformers; Liger
rounds it before."""

Patch = tuple[Any, Callable[..., Any]]
"""A module, and the `forward` that stands in for its own."""


def pieces_of(model_type: str) -> tuple[str, ...]:
    """Return the pieces of a family that fused kernels compute on this machine, but for those whose
    proof has failed in this process."""
    if not torch.cuda.is_available() or model_type not in FAMILIES:
        return ()
    pieces = PIECES if has_liger() else (LORA,)
    return tuple(piece for piece in pieces if (model_type, piece) not in _refused)


def has_liger() -> bool:
    """Whether liger-kernel is installed, and Triton, without which it does not load."""
    return all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


@dataclass
class Fused:
    """The fused forwards of one model."""

    patches: dict[str, list[Patch]]
    """Piece → modules whose forward is replaced."""
    rope: tuple[Any, Callable[..., Any]] | None
    """The module of transformers that rotates queries and keys, and the function that stands in."""
    factors: Factors
    weights: list[list[Frozen]]
    """The frozen weights behind fused forwards, layer by layer."""
    proved: tuple[str, ...] = ()
    """The pieces in use."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Piece, or `none` → relative errors (Frobenius norm) of the proof."""

    def has(self, piece: str) -> bool:
        """Whether the model has what a piece replaces."""
        return bool(self.rope if piece == ROPE else self.patches.get(piece))

    @contextmanager
    def standing_in(self, pieces: tuple[str, ...]) -> Iterator[None]:
        """Compute some pieces by fused kernels within the context."""
        self.factors.renew()
        patches = [patch for piece in pieces for patch in self.patches.get(piece, ())]
        before = [module.__dict__.get("forward") for module, _ in patches]
        rotates = self.rope if ROPE in pieces else None
        own = rotates[0].apply_rotary_pos_emb if rotates else None
        try:
            for module, forward in patches:
                module.__dict__["forward"] = forward
            if rotates:
                rotates[0].apply_rotary_pos_emb = rotates[1]
            yield
        finally:
            if rotates:
                rotates[0].apply_rotary_pos_emb = own
            for (module, _), kept in zip(patches, before, strict=True):
                if kept is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = kept


_refused: set[tuple[str, str]] = set()
"""`model_type` and piece of failed proofs."""

_known: WeakKeyDictionary[Any, Fused] = WeakKeyDictionary()
"""PEFT model → its fused forwards, proved."""


@contextmanager
def fused(model: Any, bf16: bool) -> Iterator[None]:
    """Compute a PEFT model by its proved fused kernels within the context.

    The first call proves them, which takes a layer's time a few times over. Enter it before each
    forward pass after the adapter has changed, and leave it after the backward pass.

    Parameters
    ----------
    bf16 : bool
        Whether forward passes run under bfloat16 autocast.
    """
    found = _proved(model, bf16)
    with found.standing_in(found.proved):
        yield


def keep_weights(model: Any, layers: int, bf16: bool) -> None:
    """Keep the 4-bit weights of a model's first layers dequantised, and let go of all others.

    Only fused modules read them. `bf16` is as in `fused`.
    """
    found = _proved(model, bf16) if layers else _known.get(model)
    if found is not None:
        kept = layers if LORA in found.proved else 0
        for place, weights in enumerate(found.weights):
            for frozen in weights:
                frozen.keep(place < kept)


def _proved(model: Any, bf16: bool) -> Fused:
    found = _known.get(model)
    if found is None:
        found = prepared(model)
        prove(found, model, bf16)
        _known[model] = found
    return found


def of_model(model: Any) -> Fused | None:
    """Return the fused forwards of a model, if it has been trained with them."""
    return _known.get(model)


def prepared(model: Any) -> Fused:
    """Return the fused forwards of a PEFT model, unproved."""
    base = model.get_base_model()
    family = FAMILIES.get(base.config.get_text_config().model_type)
    if family is None or getattr(base, "is_loaded_in_8bit", False):  # whose float32 is not known
        return Fused({}, None, Factors([]), [])
    forwards, factors, weights = lora_forwards(model)
    patches: dict[str, list[Patch]] = {LORA: forwards}
    rope = None
    if has_liger():
        patches |= _by_liger(base, family)
        rope = _rotation(base)
    free = {
        piece: [p for p in found if "forward" not in p[0].__dict__]  # nobody else's, as a hook's
        for piece, found in patches.items()
    }
    return Fused(free, rope, factors, _by_layer(base, weights))


def _by_layer(base: Any, weights: list[Frozen]) -> list[list[Frozen]]:
    """Return frozen weights grouped by the decoder's layers."""
    of_module = {id(frozen.module): frozen for frozen in weights}
    return [
        [of_module[id(module)] for module in layer.modules() if id(module) in of_module]
        for layer in base.get_decoder().layers
    ]


def _by_liger(base: Any, family: Family) -> dict[str, list[Patch]]:
    """Return the norms and MLPs of a decoder with Liger's forward."""
    from liger_kernel.ops import (
        LigerFusedGateUpSiLUMulFunction,
        LigerGELUMulFunction,
        LigerRMSNormFunction,
        LigerSiLUMulFunction,
    )

    decoder = base.get_decoder()
    config = base.config.get_text_config()
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    product = LigerGELUMulFunction if family is _GEMMA else LigerSiLUMulFunction
    norms: list[Patch] = []
    mlps: list[Patch] = []
    for module in decoder.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
            norms.append((module, partial(_norm, LigerRMSNormFunction.apply, module, family)))
        elif kind.endswith("MLP") and activation in family.activations:
            if hasattr(module, "gate_proj"):
                mlps.append((module, partial(_gated, product.apply, module)))
            elif hasattr(module, "gate_up_proj"):
                merged = LigerFusedGateUpSiLUMulFunction.apply
                mlps.append((module, partial(_merged, merged, module)))
    return {NORM: norms, MLP: mlps}


def _norm(
    function: Callable[..., torch.Tensor], module: Any, family: Family, x: torch.Tensor
) -> torch.Tensor:
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    # Not in place: another reader of the output may hold the same gradient.
    return function(x, module.weight, epsilon, family.offset, family.casting, False)


def _gated(function: Callable[..., torch.Tensor], module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(function(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]


def _merged(function: Callable[..., torch.Tensor], module: Any, x: torch.Tensor) -> torch.Tensor:
    both = module.gate_up_proj(x)
    product = function(both.flatten(0, -2))  # the kernel's gradient has two dimensions
    return module.down_proj(product.view(*both.shape[:-1], -1))  # type: ignore[no-any-return]


def _rotation(base: Any) -> tuple[Any, Callable[..., Any]] | None:
    """Return the module of transformers that defines a base's attention, with Liger's RoPE."""
    from liger_kernel.ops import LigerRopeFunction

    module = sys.modules[type(base.get_decoder()).__module__]
    if not hasattr(module, "apply_rotary_pos_emb"):
        return None

    def rotate(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
    ) -> Any:
        return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)

    return module, rotate


# --- Proof ----------------------------------------------------------------------------------------


def prove(found: Fused, model: Any, bf16: bool) -> None:
    """Find the pieces that are as exact as without fused kernels, by the first layer of a model.

    Output, gradient of the input and gradients of the factors, for random states of
    `PROOF_TOKENS` tokens, are compared with a float32 copy of the layer by transformers' own code,
    4-bit weights dequantised. What raises, or is less exact, is not used, with a warning that says
    why.
    """
    if not found.patches:
        return
    with one_layer(model) as decoder, torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(0)
        factors = drawn_factors(decoder)
        held = [p.detach().clone() for p in factors]
        proved: list[str] = []
        try:
            proved = _as_exact(found, decoder, bf16)
        except Exception as error:  # layers that cannot be computed on their own raise anything
            if is_out_of_memory(error):
                raise
            _warn("LoRA, norm, MLP and RoPE", f"no proof is possible ({_told(error)})")
        finally:
            set_values(factors, held)
    found.factors.renew()
    model_type = model.get_base_model().config.get_text_config().model_type
    tried = filter(found.has, PIECES)
    _refused.update((model_type, piece) for piece in tried if piece not in proved)
    found.proved = tuple(proved)


def _as_exact(found: Fused, decoder: Any, bf16: bool) -> list[str]:
    """Return the pieces that are as exact as without fused kernels; warn of the others."""
    draws = Draws(found.standing_in, decoder, bf16)
    found.errors["none"] = mean(draws.errors(1))
    proved: list[str] = []
    for piece in filter(found.has, PIECES):
        try:
            for count in (1, MORE_DRAWS):
                own, errors = draws.errors(count), draws.errors(count, piece)
                excess = excess_of(errors, own)
                if max(excess.values()) <= 0:
                    break
        except Exception as error:  # a kernel that this machine cannot compile raises anything
            if is_out_of_memory(error):
                raise
            _warn(piece, f"it fails here ({_told(error)})")
            continue
        found.errors |= {piece: mean(errors), "none": mean(own)}
        worst = max(excess, key=lambda name: excess[name])
        if excess[worst] <= 0:
            proved.append(piece)
            continue
        pair = f"{found.errors[piece][worst]:.2e}, {found.errors['none'][worst]:.2e} without"
        _warn(piece, f"the error of {worst} against float32 is {pair}")
    return proved


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _warn(piece: str, why: str) -> None:
    warnings.warn(f"The fused {piece} is not used: {why}.", RuntimeWarning, stacklevel=2)


def _devices(model: Any) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def context(model: Any, wanted: bool, bf16: bool) -> Any:
    """Return the context of `fused` if it is wanted and the model has an adapter, else none."""
    return fused(model, bf16) if wanted and hasattr(model, "get_base_model") else nullcontext()
