"""Whether one way to compute a decoder's layer is as exact as another, against float32.

Output, gradient of the input and gradients of the factors are compared for random states, by the
first layer of a model and a float32 copy of it.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from grandrounds.model.base import mixed_precision
from grandrounds.model.lora_linear import Frozen, is_four_bits

SLACK = 1.05
"""A piece is used if its errors against float32 are at most this multiple of those without it: two
roundings of equal quality differ by a few per cent on `PROOF_TOKENS` tokens of a large layer."""

PROOF_TOKENS = 256

MORE_DRAWS = 16
"""Draws of factors and states that decide where a single one refuses a piece, which it then is if
its errors are too large on (geometric) average by more than two standard errors. In a small layer a
few large gradients decide an error: equal roundings differ by up to 30 % in one draw, to either
side."""

FLOOR = 2e-5
"""Relative error of float32 itself, where the compared products are in float32 too."""


Errors = dict[str, float]
"""Relative errors of one draw."""

StandingIn = Callable[[tuple[str, ...]], AbstractContextManager[None]]
"""Computes pieces of the layer in another way within a context."""


class Draws:
    """Factors and states drawn at random as they are needed, with their results in float32."""

    def __init__(self, standing_in: StandingIn, decoder: Any, bf16: bool) -> None:
        self._standing_in, self._decoder, self._bf16 = standing_in, decoder, bf16
        self._exact = _in_float32(decoder)
        self._drawn: list[tuple[list[torch.Tensor], ...]] = []
        self._own: list[Errors] = []

    def errors(self, count: int, piece: str | None = None) -> list[Errors]:
        """Return the errors in some draws, with one piece standing in or none."""
        while len(self._drawn) < count:
            self._draw()
            self._own.append(self._errors(self._drawn[-1], ()))
        if piece is None:
            return self._own[:count]
        return [self._errors(drawn, (piece,)) for drawn in self._drawn[:count]]

    def _draw(self) -> None:
        weight = self._decoder.embed_tokens.weight
        # B is 0 at first, and so is A's gradient
        values = [torch.randn_like(p) * p.shape[-1] ** -0.5 for p in drawn_factors(self._decoder)]
        shape = (1, PROOF_TOKENS, self._decoder.config.get_text_config().hidden_size)
        states = [torch.randn(shape, device=weight.device).to(weight.dtype) for _ in "ab"]
        set_values(drawn_factors(self._exact), values)
        with _exact_products():
            truth = _results(self._exact, states[0].float(), states[1].float(), False)
        self._drawn.append((values, states, truth))

    def _errors(self, drawn: tuple[list[torch.Tensor], ...], pieces: tuple[str, ...]) -> Errors:
        values, states, truth = drawn
        set_values(drawn_factors(self._decoder), values)
        with self._standing_in(pieces):
            return _errors(_results(self._decoder, states[0], states[1], self._bf16), truth)


def drawn_factors(decoder: Any) -> list[torch.Tensor]:
    """Return A and B of a decoder's modules; DoRA's magnitudes stay as they are."""
    found = decoder.layers.named_parameters()
    return [p for name, p in found if ".lora_" in name and p.dim() == 2]


@torch.no_grad()
def set_values(parameters: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def excess_of(found: list[Errors], own: list[Errors]) -> Errors:
    """Return by how much errors exceed what is allowed, beyond doubt: of the logarithms of their
    ratios the mean less two standard errors; above 0 a piece is refused."""
    excess = {}
    for name in own[0]:
        logs = [
            math.log((e[name] + 1e-30) / (SLACK * o[name] + FLOOR))
            for e, o in zip(found, own, strict=True)
        ]
        doubt = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
        excess[name] = statistics.fmean(logs) - 2 * doubt
    return excess


def mean(errors: list[Errors]) -> Errors:
    """Return the geometric means of errors by name."""
    logs = {name: [math.log(e[name] + 1e-30) for e in errors] for name in errors[0]}
    return {name: math.exp(statistics.fmean(values)) for name, values in logs.items()}


@contextmanager
def one_layer(model: Any) -> Iterator[Any]:
    """Give the model's decoder with its first layer only, in evaluation mode, for a while."""
    decoder = model.get_base_model().get_decoder()
    layers, training = decoder.layers, model.training
    model.eval()
    decoder.layers = torch.nn.ModuleList(list(layers)[:1])
    try:
        yield decoder
    finally:
        decoder.layers = layers
        model.train(training)


def _in_float32(decoder: Any) -> Any:
    """Return a copy of a decoder in float32; embeddings, which are not read, are shared."""
    embeddings = decoder.embed_tokens
    copied = copy.deepcopy(decoder, {id(embeddings): None})
    for parent in list(copied.modules()):
        for name, module in list(parent.named_children()):
            if is_four_bits(module):
                setattr(parent, name, _dequantized(module))
    copied.float()
    copied.embed_tokens = embeddings
    return copied


def _dequantized(module: Any) -> torch.nn.Linear:
    weight = Frozen(module).weight.float()
    linear = torch.nn.Linear(
        weight.shape[1], weight.shape[0], module.bias is not None, weight.device
    )
    linear.requires_grad_(False)
    linear.weight.copy_(weight)
    if module.bias is not None:
        linear.bias.copy_(module.bias)
    return linear


@contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, not TF32, within the context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _results(
    decoder: Any, states: torch.Tensor, upstream: torch.Tensor, bf16: bool
) -> list[torch.Tensor]:
    """Return a decoder's output, and the gradients of its input and of its factors."""
    states = states.clone().requires_grad_()
    factors = [p for p in decoder.layers.parameters() if p.requires_grad]
    with torch.enable_grad(), mixed_precision(states.device, bf16):
        output = decoder(inputs_embeds=states, use_cache=False).last_hidden_state
        gradients = torch.autograd.grad(output, [states, *factors], upstream.to(output.dtype))
    return [output.detach(), *gradients]


def _errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, float]:
    """Return the relative errors of output and gradients; of factors their root mean square."""
    output, of_input, *of_factors = (
        float((one.float() - exact).norm() / exact.norm())
        for one, exact in zip(found, truth, strict=True)
    )
    mean_square = sum(error**2 for error in of_factors) / max(1, len(of_factors))
    return {
        "the output": output,
        "the input's gradient": of_input,
        "the factors' gradients": math.sqrt(mean_square),
    }
