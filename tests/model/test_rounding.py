"""In bfloat16: rounding is told from a wrong way of reading, in shallow models and in deep ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from grandrounds.model import prefill
from grandrounds.model.cached import evaluating
from grandrounds.model.prefill import (
    BATCHED,
    SHARED,
    SINGLE,
    WHOLE,
    families_proven,
    proven_layout,
)
from grandrounds.model.rounding import ROUNDING_FACTOR, apart, rerounded
from tests.model.test_families import model_of

SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(layers: int, spread: float, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, initializer_range=spread)
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).unsqueeze(0)
    with evaluating(model):
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


DEPTHS = {"shallow": (2, 0.1), "deep": (24, 0.15)}
"""Layers and standard deviation of the weights."""


@pytest.mark.parametrize(("layers", "spread"), DEPTHS.values(), ids=DEPTHS)
def test_rerounding_moves_logits_about_twice_as_far_as_bfloat16_does(
    layers: int, spread: float
) -> None:
    model = llama(layers, spread)
    plain = logits(model)
    with rerounded(model):
        moved = logits(model)
    assert torch.equal(logits(model), plain)  # no hook is left
    exact = logits(model.float())
    assert 1 < apart(moved, plain) / apart(exact, plain) < 5


def test_float32_is_not_moved() -> None:
    model = llama(2, 0.02, torch.float32)
    plain = logits(model)
    with rerounded(model):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(("layers", "spread"), DEPTHS.values(), ids=DEPTHS)
def test_in_bfloat16_the_cache_is_used_however_deep_a_model_is(layers: int, spread: float) -> None:
    """SmolLM2 and random 8B shapes were refused for a difference that was rounding."""
    model = llama(layers, spread)
    assert proven_layout(model, 0) == SHARED
    assert families_proven(model)


Inputs = dict[str, Any]


def planted(model: Any, fault: Callable[[Inputs], None]) -> Any:
    """Change what a model is asked wherever it reads with a cache."""
    own = model.forward

    def forward(**inputs: Any) -> Any:
        if inputs.get("use_cache"):
            fault(inputs)
        return own(**inputs)

    model.forward = forward
    return model


def a_position_too_far(inputs: Inputs) -> None:
    """As if the padding's columns counted, or one token of a continuation did."""
    if inputs.get("cache") is not None:
        inputs["position_ids"] = inputs["position_ids"] + 1


def a_token_unseen(inputs: Inputs) -> None:
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, 1] = 0


def padding_seen(inputs: Inputs) -> None:
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])


def of_another_prefix(inputs: Inputs) -> None:
    """The first token of whatever is read first is another one."""
    if inputs.get("cache") is None and inputs.get("attention_mask") is None:
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][:, 0] += 1


FAULTS = {
    "position": (a_position_too_far, WHOLE),
    "unseen": (a_token_unseen, WHOLE),
    "padding": (padding_seen, SINGLE),
    "prefix": (of_another_prefix, BATCHED),
}


@pytest.mark.parametrize(("layers", "spread"), DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("fault", "layout"), FAULTS.values(), ids=FAULTS)
def test_in_bfloat16_a_wrong_way_is_refused(
    fault: Callable[[Inputs], None],
    layout: str,
    layers: int,
    spread: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = planted(llama(layers, spread), fault)
    assert proven_layout(model, 0) == layout
    assert "gives other results" in capsys.readouterr().err


def test_in_bfloat16_a_window_that_the_cache_ignores_is_refused() -> None:
    """The cache keeps too many tokens: those that follow see some before the window."""
    torch.manual_seed(0)
    config = MistralConfig(
        **SHAPE, num_hidden_layers=2, initializer_range=0.15, sliding_window=12, pad_token_id=0
    )
    model = MistralForCausalLM(config).bfloat16().eval()
    assert proven_layout(model, 0) == SHARED
    prefill._proven.clear()
    own = model.forward

    def forward(**inputs: Any) -> Any:
        config.sliding_window = 13 if inputs.get("use_cache") else 12
        return own(**inputs)

    model.forward = forward
    assert proven_layout(model, 0) == WHOLE


@pytest.mark.parametrize("name", ["gpt_neo", "mpt", "jamba"])
def test_in_bfloat16_models_with_positions_by_column_or_a_lost_state_are_refused(name: str) -> None:
    model = model_of(name)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    assert proven_layout(model.bfloat16(), 0) == (WHOLE if name == "jamba" else BATCHED)


def test_the_factor_leaves_room_for_two_ways_that_round_apart() -> None:
    """Without a cache, one prompt alone and beside a longer one: both right."""
    for layers, spread in DEPTHS.values():
        model = llama(layers, spread)
        short = torch.arange(3, 43).unsqueeze(0)
        pair = torch.zeros((2, 57), dtype=torch.long)
        pair[0, :40], pair[1] = short[0], torch.arange(3, 60)
        mask = (pair > 0).long()
        with evaluating(model):
            beside = model(input_ids=pair, attention_mask=mask, use_cache=False).logits[:1, :40]
        with rerounded(model):
            moved = logits(model)
        plain = logits(model)
        assert apart(beside.float(), plain) < ROUNDING_FACTOR * apart(moved, plain) / 2
