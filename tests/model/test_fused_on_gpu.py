"""Liger's own kernels, and LoRA's function in bfloat16, on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import fused
from grandrounds.model.fused import LORA, PIECES
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from tests.model.test_fused import BATCH, of_family
from tests.model.test_lora_linear import adapted, error, llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not fused.has_liger(), reason="no liger-kernel"),
]

PADDED = Forward(bf16=False, padding_free=False, answers_only=False, chunk_tokens=0)


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(fused, "_refused", set())


def gradient(model: Any, how: Forward, seed: int = 0, shift: int = 0) -> torch.Tensor:
    """Return the gradient of all factors for a batch, in float64.

    `seed` is the generator's before the pass, `shift` is added to all tokens.
    """
    device = next(model.parameters()).device
    batch = [TokenizedExample(tuple(t + shift for t in e.input_ids), 2) for e in BATCH]
    torch.manual_seed(seed)
    with attending(model, how):
        answer_nll_sum(model, batch, 0, device, how).backward()
    factors = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten().double() for p in factors])  # type: ignore[union-attr]
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", fused.FAMILIES)
def test_ligers_kernels_compute_what_transformers_does_in_float32(name: str) -> None:
    model = of_family(name).cuda()
    plain = gradient(model, PADDED)
    found = fused.prepared(model)
    for piece in PIECES:
        with found.standing_in((piece,)):
            ours = gradient(model, PADDED)
        assert error(ours, plain) < 1e-4, piece


@pytest.mark.parametrize("name", fused.FAMILIES)
def test_in_bfloat16_what_is_proved_is_no_less_exact_and_what_is_not_is_said(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    """All pieces run on every family; the few values of a tiny layer may refuse one of them, by a
    hair. A wrong kernel is wrong by ten times."""
    warnings.simplefilter("always")
    exact = of_family(name).cuda()
    model = of_family(name).cuda()
    for rounded, parameter in zip(model.parameters(), exact.parameters(), strict=True):
        if not rounded.requires_grad:
            rounded.data = rounded.data.bfloat16()
            parameter.data = rounded.data.float()
    plain = replace(PADDED, bf16=True)
    errors = [
        [
            error(gradient(model, how, shift=shift), gradient(exact, PADDED, shift=shift))
            for shift in range(0, 80, 10)
        ]
        for how in (plain, replace(plain, fused=True))
    ]
    found = fused.of_model(model)
    assert found is not None
    told = [str(warning.message) for warning in recwarn]
    assert set(found.errors) == {"none", *PIECES}, told  # none of them raised
    ratios = {
        (piece, part): found.errors[piece][part] / found.errors["none"][part]
        for piece in PIECES
        for part in found.errors["none"]
    }
    assert max(ratios.values()) < 2, ratios
    refused = [piece for piece in PIECES if piece not in found.proved]
    assert len(refused) <= 1, told
    assert all(any(f"The fused {piece} is not used" in text for text in told) for piece in refused)
    own, ours = (sum(map(math.log, of_batches)) / 8 for of_batches in errors)
    assert math.exp(ours - own) <= 1.5, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_takes_pefts_mask(dtype: torch.dtype) -> None:
    """A GPU draws eight values at a time in bfloat16 and four in float32, so that the masks differ:
    PEFT casts to float32 before."""
    model = adapted(llama(dtype), lora_dropout=0.3).cuda()
    plain = Forward(dtype == torch.bfloat16, True, True, 64)
    fused.keep_weights(model, 1, plain.bf16)
    found = fused.of_model(model)
    assert found is not None
    reference = gradient(model, plain, seed=5)
    with found.standing_in((LORA,)):
        same, other = (error(gradient(model, plain, seed), reference) for seed in (5, 6))
    assert same < 0.1, (same, other)  # rounding; another mask moves it by more than 0.3
    assert other > 0.3, (same, other)
