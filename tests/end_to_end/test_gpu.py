"""Tests that need a CUDA device; run them with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.base import BaseSpec, has_bfloat16
from grandrounds.model.lora import LoraSpec
from grandrounds.model.loss import Forward
from grandrounds.model.resident import checkpoint_activations, resident_model
from grandrounds.site.training import VisitResult, VisitSettings, train_visit
from grandrounds.wire.schedule import VisitSchedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LORA = LoraSpec(8, 32.0, "q_proj,v_proj", 0.0)
EXAMPLES = [TokenizedExample(tuple(range(2, 2 + length)), 4) for length in (12, 20, 31, 9)]


def visit(base: Path, *, checkpointing: bool, optimizer: str, lora: LoraSpec = LORA) -> VisitResult:
    """Train eight steps on an NF4 base."""
    resident = resident_model(BaseSpec(str(base), 4, "auto"), lora)
    checkpoint_activations(resident, checkpointing)
    parameters = list(resident.parameters.values())
    assert all(p.dtype == torch.float32 and p.device.type == "cuda" for p in parameters)
    before = [p.detach().clone() for p in parameters]
    settings = VisitSettings(
        1, VisitSchedule(1e-3, 2), optimizer, 0.0, 1.0, 0.01, Forward(True, True, True, 1024), 1
    )
    result = train_visit(resident.model, parameters, [EXAMPLES] * 8, settings, 0)
    assert all(torch.isfinite(p).all() for p in parameters)
    assert any(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_an_nf4_base_trains_a_float32_adapter(
    tiny_base: Path, checkpointing: bool, optimizer: str
) -> None:
    assert visit(tiny_base, checkpointing=checkpointing, optimizer=optimizer).steps == 8


def test_paged_memory_does_not_grow_from_visit_to_visit(tiny_base: Path) -> None:
    """Tensors of at least 1e5 elements are paged, and bitsandbytes never frees them."""
    from bitsandbytes.functional import GlobalPageManager

    lora = LoraSpec(1024, 1024.0, "q_proj,v_proj,gate_proj", 0.0)
    visit(tiny_base, checkpointing=False, optimizer="paged_adamw_8bit", lora=lora)
    paged = len(GlobalPageManager.get_instance().paged_tensors)
    for _ in range(3):
        visit(tiny_base, checkpointing=False, optimizer="paged_adamw_8bit", lora=lora)
    assert len(GlobalPageManager.get_instance().paged_tensors) == paged


def test_the_precision_is_that_of_the_device(tiny_base: Path) -> None:
    resident = resident_model(BaseSpec(str(tiny_base), 0, "auto"), LORA)
    expected = torch.bfloat16 if has_bfloat16() else torch.float32
    assert resident.model.get_base_model().lm_head.weight.dtype == expected
