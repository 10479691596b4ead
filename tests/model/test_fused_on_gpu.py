"""Liger's own kernels, and LoRA's function in bfloat16, on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

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


def gradient(model: Any, how: Forward, seed: int = 0) -> torch.Tensor:
    """Return the gradient of all factors for a batch, in float64."""
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    with attending(model, how):
        answer_nll_sum(model, BATCH, 0, device, how).backward()
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
def test_in_bfloat16_all_pieces_are_proved_and_no_less_exact_together(name: str) -> None:
    exact = of_family(name).cuda()
    model = of_family(name).cuda()
    for rounded, parameter in zip(model.parameters(), exact.parameters(), strict=True):
        if not rounded.requires_grad:
            rounded.data = rounded.data.bfloat16()
            parameter.data = rounded.data.float()
    truth = gradient(exact, PADDED)
    plain = replace(PADDED, bf16=True)
    ways = (plain, replace(plain, fused=True))
    errors = [error(gradient(model, how), truth) for how in ways]
    found = fused.of_model(model)
    assert found is not None
    assert found.proved == PIECES
    assert errors[1] <= 1.25 * errors[0]


def test_dropout_takes_pefts_mask() -> None:
    model = adapted(llama(torch.bfloat16), lora_dropout=0.3).cuda()
    plain = Forward(True, True, True, 64)
    fused.keep_weights(model, 1, bf16=True)
    found = fused.of_model(model)
    assert found is not None
    reference = gradient(model, plain, seed=5)
    with found.standing_in((LORA,)):
        assert error(gradient(model, plain, seed=5), reference) < 0.03
        assert error(gradient(model, plain, seed=6), reference) > 0.3
