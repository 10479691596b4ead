"""Gradients of LoRA factors for each unit of a batch, in one backward pass.

A factor W computes y = x W^T over all tokens. The gradient of a unit is the sum of g_t^T x_t over
the tokens t of its records, so the backward pass is split by record where it is summed over tokens
anyway. With ranks of 8 to 16 this takes less than the norms alone by products of tokens (Li et al.,
Large language models can be strong DP learners, 2022, section 4).

Nothing of the model is wrapped or copied: for the duration of a visit the factors' `forward` is
replaced, so that the names under which PEFT saves them stay.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from grandrounds.errors import ModelError

Spans = list[tuple[int, int, int]]
"""(slot, first token, end) of each record, among the tokens of a batch in a row."""


@dataclass
class UnitGradients:
    """The gradients of the units of a batch, one slot each."""

    parameters: Sequence[torch.nn.Parameter]
    """The trained factors."""
    gradients: list[torch.Tensor]
    """Of each factor: float32 of (slots, outputs, inputs)."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each record of the batch."""
    slots: list[int] = field(default_factory=list)
    """Slot of each record's unit."""
    padding_free: bool = True
    """Whether the records are concatenated; otherwise they are padded on the right."""
    _slots_of: list[tuple[torch.Tensor, ...]] = field(init=False)
    _counts_uses: bool = False
    _used: Counter[int] = field(default_factory=Counter)
    _gave: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._slots_of = [gradient.unbind() for gradient in self.gradients]

    @contextmanager
    def of_batch(
        self, lengths: Sequence[int], slots: Sequence[int], padding_free: bool
    ) -> Iterator[None]:
        """Run a batch's forward pass within the context; its backward pass fills the slots."""
        self.lengths, self.slots, self.padding_free = list(lengths), list(slots), padding_free
        self._used.clear()
        self._gave.clear()
        self._counts_uses = True  # checkpointing repeats the forward pass in the backward one
        try:
            yield
        finally:
            self._counts_uses = False

    def check(self) -> None:
        """Check that each factor gave a gradient for each of its uses, and to nobody else.

        Raises
        ------
        ModelError
            If one did not: what would be released is then not what was clipped.
        """
        for number, parameter in enumerate(self.parameters):
            used, gave = self._used[number], self._gave[number]
            if not used or used != gave or parameter.grad is not None:
                raise ModelError(
                    f"A private visit saw {used} uses of the trained tensor {number} of shape "
                    f"{tuple(parameter.shape)} and {gave} gradients of it"
                    f"{', and one past the clip' if parameter.grad is not None else ''}: this "
                    "base cannot be trained with privacy.unit-guarantee."
                )

    def used(self, number: int) -> None:
        """Note a use of a factor in the forward pass."""
        self._used[number] += self._counts_uses

    def add(self, number: int, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add what one use of a factor gives to each unit.

        Parameters
        ----------
        gradient : tensor of (..., outputs)
            Of the loss by the factor's outputs.
        inputs : tensor of (..., inputs)
        """
        self._gave[number] += 1
        g, x = gradient.flatten(0, -2), inputs.flatten(0, -2)
        spans = self._spans(len(x))
        if x.is_cuda:
            add_at_once(self.gradients[number], g, x, spans)
        else:
            across, each = g.T, self._slots_of[number]
            for slot, start, end in spans:
                each[slot].addmm_(across[:, start:end], x[start:end])

    def _spans(self, tokens: int) -> Spans:
        """Return where each record is among the tokens that a factor sees."""
        if self.padding_free:
            starts = list(itertools.accumulate(self.lengths[:-1], initial=0))
            fits = tokens == sum(self.lengths)
        else:
            width, rest = divmod(tokens, len(self.lengths))
            starts = [row * width for row in range(len(self.lengths))]
            fits = not rest and width == max(self.lengths)
        if not fits:
            raise ModelError(
                f"A trained module was given {tokens} tokens for records of {self.lengths}: this "
                "base mixes or reorders them, and cannot be trained with privacy.unit-guarantee."
            )
        return [
            (slot, start, start + length)
            for slot, start, length in zip(self.slots, starts, self.lengths, strict=True)
        ]


def add_at_once(into: torch.Tensor, g: torch.Tensor, x: torch.Tensor, spans: Spans) -> None:
    """Add all records' gradients with one batched product, which a GPU prefers to many."""
    g, x = (pad_sequence([t[a:b] for _, a, b in spans], batch_first=True) for t in (g, x))
    each = torch.bmm(g.transpose(1, 2), x)  # (records, outputs, inputs)
    slots = torch.tensor([slot for slot, _, _ in spans], device=into.device)
    into.index_add_(0, slots, each.to(into.dtype))


class _Linear(torch.autograd.Function):
    """A product with a factor that gives the factor's gradient to its units, not to `.grad`.

    The factor is known by its number: with gradient checkpointing the tensor that comes back from
    `saved_tensors` is another object than the parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, units: UnitGradients, number: int
    ) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.units, ctx.number = units, number
        units.used(number)
        with torch.autocast(device, enabled=False):
            return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.units.add(ctx.number, upstream[0], x)
        return upstream[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None


@contextmanager
def per_unit(
    model: Any, parameters: Sequence[torch.nn.Parameter], slots: int
) -> Iterator[UnitGradients]:
    """Give the gradients of LoRA factors to the units of each batch within the context.

    Parameters
    ----------
    parameters
        All trained parameters: weights of linear modules without a bias.
    slots : int
        Units of a batch, at most.

    Raises
    ------
    ModelError
        If a trained parameter is anything else, such as a bias or a DoRA magnitude.
    """
    shapes = [(slots, *parameter.shape) for parameter in parameters]
    device = parameters[0].device
    units = UnitGradients(parameters, [torch.zeros(shape, device=device) for shape in shapes])
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    modules = [
        (module, numbers[id(module.weight)])
        for module in model.modules()
        if type(module) is torch.nn.Linear and id(module.weight) in numbers and module.bias is None
    ]
    if len({number for _, number in modules}) < len(parameters) or _trains_more(model, parameters):
        raise ModelError(
            "privacy.unit-guarantee trains LoRA's factors A and B of linear modules and nothing "
            "else: no bias, no magnitudes of DoRA, no whole modules."
        )
    before = [module.__dict__.get("forward") for module, _ in modules]
    try:
        for module, number in modules:
            module.forward = _forward(module.weight, units, number)
        yield units
    finally:
        for (module, _), own in zip(modules, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _trains_more(model: Any, parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Whether the model trains a parameter that is not among those given."""
    known = {id(parameter) for parameter in parameters}
    return any(p.requires_grad and id(p) not in known for p in model.parameters())


def _forward(weight: torch.nn.Parameter, units: UnitGradients, number: int) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, weight, units, number)  # type: ignore[no-any-return,no-untyped-call]

    return forward
