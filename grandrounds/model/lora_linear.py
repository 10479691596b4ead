"""A frozen linear module with LoRA as one autograd function.

PEFT adds s B A x to W x + b by separate modules: a copy of W x + b, casts of float32 factors, a
multiplication by s and a sum, each a launch of its own. Here

    h = s x A^T,  y = x W^T + b + h B^T;    dh = s g B,  dx = g W + dh A,  dA = dh^T x,  dB = g^T h

are five products forward and backward beside those with W. Only x and h are kept, the factors are
cast once a pass for all modules together, and s is multiplied in float32 within a product. A 4-bit
W (Dettmers et al., QLoRA, 2023, equation 5) is dequantised once forward and once backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

Forward = Callable[..., torch.Tensor]


class Frozen:
    """The weight and bias of a frozen linear module, W of (outputs, inputs)."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.is_quantized = type(module) is not torch.nn.Linear
        self._kept: torch.Tensor | None = None
        self._state: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the product with it."""
        if not self.is_quantized:
            return self.module.weight.dtype  # type: ignore[no-any-return]
        return self.module.weight.quant_state.dtype  # type: ignore[no-any-return]

    @property
    def bias(self) -> torch.Tensor | None:
        """b: (outputs), in the type of the product."""
        bias = self.module.bias
        return None if bias is None else bias.to(self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """W, dequantised where it is stored in 4 bits."""
        if self._kept is not None:
            return self._kept
        weight = self.module.weight
        if not self.is_quantized:
            return weight  # type: ignore[no-any-return]
        if self._state is None:
            self._state = _with_plain_scales(weight.quant_state)
        return _dequantized(weight, self._state)

    def keep(self, wanted: bool) -> None:
        """Keep a 4-bit W dequantised from now on, or let go of it."""
        if not wanted:
            self._kept = None
        elif self.is_quantized and self._kept is None:
            self._kept = _dequantized(self.module.weight, self.module.weight.quant_state)
            self._state = None


def _dequantized(weight: Any, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]


def _with_plain_scales(state: Any) -> Any:
    """Return bitsandbytes' state of a weight with its scales in float32, 4 bytes per 64 weights.

    Under double quantisation they are stored in 8 bits, and dequantising them first takes as long
    to start as the weight itself.
    """
    if not state.nested:
        return state
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    return QuantState(
        absmax=(dequantize_blockwise(state.absmax, state.state2) + state.offset).float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


class Factors:
    """The factors A and B of all adapted modules, cast to the type of the products once a pass."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self._casts: list[torch.Tensor] = []
        self._places = {id(p): place for place, p in enumerate(self._parameters)}
        self._is_stale = True

    def renew(self) -> None:
        """Cast again at the next use; call it before each pass, as the factors may have changed."""
        self._is_stale = True

    def cast(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a factor in a type; the factor itself if it has it. Call it without gradients."""
        if parameter.dtype == dtype:
            return parameter
        if self._is_stale or self._casts[0].dtype != dtype:
            # New tensors each time: those of an earlier pass may still wait for its backward pass.
            self._casts = [torch.empty_like(p, dtype=dtype) for p in self._parameters]
            torch._foreach_copy_(self._casts, [p.detach() for p in self._parameters])
            self._is_stale = False
        return self._casts[self._places[id(parameter)]]


@dataclass(frozen=True)
class Adapted:
    """A frozen linear module with its factors."""

    frozen: Frozen
    a: torch.Tensor
    """A: (r, inputs)."""
    b: torch.Tensor
    """B: (outputs, r)."""
    factors: Factors
    """Holds casts of A and B."""


class _Lora(torch.autograd.Function):
    """`lora_linear`; float32 factors are inputs for their gradients, casts for products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        module: Adapted,
        how: tuple[float, float],
    ) -> torch.Tensor:
        cast_a, cast_b = (module.factors.cast(factor, x.dtype) for factor in (a, b))
        scale, dropout = how
        rows = x.reshape(-1, x.shape[-1])  # (tokens, inputs)
        dropped, mask = rows, None
        if dropout:
            # A GPU draws another mask for another type: PEFT casts x, except over 4-bit weights.
            drawn_in = rows if module.frozen.is_quantized else rows.to(a.dtype)
            dropped, mask = torch.native_dropout(drawn_in, dropout, True)
            dropped = dropped.to(rows.dtype)
        nothing = rows.new_empty(1)  # not read where beta is 0
        h = torch.addmm(nothing, dropped, cast_a.t(), beta=0, alpha=scale)  # (tokens, r)
        y = linear(rows, module.frozen.weight, module.frozen.bias).addmm_(h, cast_b.t())
        ctx.save_for_backward(rows, mask, h, cast_a, cast_b)
        ctx.frozen, ctx.how = module.frozen, how
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, mask, h, a, b = ctx.saved_tensors
        scale, dropout = ctx.how
        g = upstream[0].reshape(-1, upstream[0].shape[-1])  # (tokens, outputs)
        dh = torch.addmm(g.new_empty(1), g, b, beta=0, alpha=scale)  # (tokens, r)
        dx = da = db = None
        if ctx.needs_input_grad[1]:
            da = _product(dh.t(), rows if mask is None else _masked(rows, mask, dropout))
        if ctx.needs_input_grad[2]:
            db = _product(g.t(), h)
        if ctx.needs_input_grad[0]:
            dx = g @ ctx.frozen.weight
            if mask is None:
                dx.addmm_(dh, a)
            else:
                dx.add_(_masked(dh @ a, mask, dropout))
            dx = dx.view(*upstream[0].shape[:-1], dx.shape[-1])
        return dx, da, db, None, None


def _masked(x: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return x * mask / (1 - p), as dropout computes it."""
    return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - dropout))  # type: ignore[no-any-return]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product of two matrices in float32, or in a wider type that they have."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)  # not rounded in between
    product = left @ right
    return product if product.dtype == torch.float64 else product.float()


class _Plain(torch.autograd.Function):
    """A product with a frozen weight, which is dequantised again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Frozen) -> torch.Tensor:
        ctx.frozen = frozen
        return linear(x, frozen.weight, frozen.bias)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return upstream[0] @ ctx.frozen.weight, None


def lora_linear(
    x: torch.Tensor, module: Adapted, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Return W x + bias + s B A dropout(x).

    Parameters
    ----------
    x : tensor of (..., inputs)
        In the type of the product with W.
    scale : float
        s.
    dropout : float
        Probability with which a value of A's input is dropped; the mask is PEFT's for an equal
        state of the GPU's generator.

    Returns
    -------
    tensor of (..., outputs), in the type of x.
    """
    how = (scale, dropout)
    return _Lora.apply(x, module.a, module.b, module, how)  # type: ignore[no-any-return,no-untyped-call]


# --- Modules --------------------------------------------------------------------------------------


def lora_forwards(model: Any) -> tuple[list[tuple[Any, Forward]], Factors, list[Frozen]]:
    """Return the modules of a PEFT model that have a fused forward, with it.

    These are linear modules, in float32, bfloat16 or 4 bits, with one LoRA adapter, and 4-bit ones
    without: any rank, scale (rsLoRA, patterns) and dropout. DoRA, LoRA with a bias, 8 bits and
    transposed weights keep their own.

    Returns
    -------
    Modules with their forward; their factors; and all frozen weights.
    """
    adapted = dict(_adapted(model))
    factors = Factors([p for layer in adapted for p in _factors_of(layer)])
    forwards, weights, bases = [], [], set()
    for layer in adapted:
        frozen = Frozen(layer.base_layer)
        bases.add(id(layer.base_layer))
        weights.append(frozen)
        forwards.append((layer, _lora_forward(layer, frozen, factors)))
    for module in model.modules():
        if _computes_as_stored(module) and id(module) not in bases:
            frozen = Frozen(module)
            weights.append(frozen)
            forwards.append((module, _plain_forward(module, frozen)))
    return forwards, factors, weights


def _adapted(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield the LoRA modules that have a fused forward, each with the name of its adapter."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or len(layer.lora_A) != 1:
            continue
        (name,) = layer.lora_A
        base = layer.base_layer
        is_plain = type(base) is torch.nn.Linear and base.weight.is_floating_point()
        if (is_plain or _computes_as_stored(base)) and name not in layer.lora_variant:
            a, b = layer.lora_A[name], layer.lora_B[name]
            if type(a) is type(b) is torch.nn.Linear and a.bias is None and b.bias is None:
                yield layer, name


def is_four_bits(module: Any) -> bool:
    """Whether a module is bitsandbytes' linear one with a quantised weight of (outputs, inputs)."""
    kind = type(module)  # PEFT's module on it has the same name
    if kind.__name__ != "Linear4bit" or not kind.__module__.startswith("bitsandbytes."):
        return False
    state = getattr(module.weight, "quant_state", None)
    return state is not None and tuple(state.shape) == (module.out_features, module.in_features)


def _computes_as_stored(module: Any) -> bool:
    """Whether a 4-bit module multiplies in the type that its weight was quantised from."""
    if not is_four_bits(module):
        return False
    return module.compute_dtype in (None, module.weight.quant_state.dtype)


def _factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _lora_forward(layer: Any, frozen: Frozen, factors: Factors) -> Forward:
    (name,) = layer.lora_A
    module = Adapted(frozen, *_factors_of(layer), factors)
    dropout = layer.lora_dropout[name]
    own = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        off = layer.disable_adapters or layer.merged or name not in layer.active_adapters
        if off or args or kwargs or not _has_its_type(x, frozen, module.a):
            return own(x, *args, **kwargs)  # type: ignore[no-any-return]
        dropped = getattr(dropout, "p", 0.0) if layer.training else 0.0
        return lora_linear(x, module, layer.scaling[name], dropped)

    return forward


def _plain_forward(module: Any, frozen: Frozen) -> Forward:
    own = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not _has_its_type(x, frozen):
            return own(x)  # type: ignore[no-any-return]
        if x.requires_grad:
            return _Plain.apply(x, frozen)  # type: ignore[no-any-return,no-untyped-call]
        return linear(x, frozen.weight, frozen.bias)

    return forward


def _has_its_type(x: torch.Tensor, frozen: Frozen, factor: torch.Tensor | None = None) -> bool:
    """Whether the products with x are all in its own type, as they are in PEFT's and bitsandbytes'
    forward: without autocast PEFT multiplies by a factor in the factor's type."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.dtype == frozen.dtype == torch.get_autocast_dtype(device)
    return x.dtype == frozen.dtype and (factor is None or factor.dtype == x.dtype)
