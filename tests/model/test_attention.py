"""A visit's rotary embedding has the values and gradients of transformers' own, bit for bit."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grandrounds.model.attention import by_sequence, half_turn, turning_at_once


def test_half_a_turn_is_transformers_own_bit_for_bit() -> None:
    rotate_half = importlib.import_module("transformers.models.llama.modeling_llama").rotate_half
    torch.manual_seed(0)
    x, upstream = torch.randn(1, 3, 5, 8, requires_grad=True), torch.randn(1, 3, 5, 8)
    ours = x.detach().clone().requires_grad_()
    expected, output = (f(t) * 1.5 + t * 0.3 for f, t in ((rotate_half, x), (half_turn, ours)))
    expected.backward(upstream)
    output.backward(upstream)
    assert torch.equal(output, expected)
    assert ours.grad is not None
    assert torch.equal(ours.grad, x.grad)


def test_it_replaces_the_models_own_within_the_context_only(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    module = importlib.import_module(type(model).__module__)
    own = module.rotate_half
    with by_sequence(model):
        assert module.rotate_half is half_turn
    assert module.rotate_half is own


def test_another_rotation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some architectures rotate pairs of neighbours and not the two halves."""

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    module = types.ModuleType("of_pairs")
    module.rotate_half = rotate_half  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_pairs", module)
    with turning_at_once(type("Model", (), {"__module__": "of_pairs"})()):
        assert module.rotate_half is rotate_half
