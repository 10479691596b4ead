"""Tests that need a CUDA device; run them with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import attention
from grandrounds.model.attention import ERROR_FACTOR, PATHS, Layer, errors, path_of
from grandrounds.model.base import BaseSpec, has_bfloat16
from grandrounds.model.lora import LoraSpec
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.resident import checkpoint_activations, resident_model
from grandrounds.site.training import VisitResult, VisitSettings, train_visit
from grandrounds.wire.schedule import VisitSchedule
from tests.conftest import make_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LORA = LoraSpec(8, 32.0, "q_proj,v_proj", 0.0)
EXAMPLES = [TokenizedExample(tuple(range(2, 2 + length)), 4) for length in (12, 20, 31, 9)]


@pytest.fixture(scope="module")
def even_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose widths are multiples of NF4's blocks of 64, as those of real bases are."""
    return make_base(tmp_path_factory.mktemp("even"), hidden=64)


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
    even_base: Path, checkpointing: bool, optimizer: str
) -> None:
    assert visit(even_base, checkpointing=checkpointing, optimizer=optimizer).steps == 8


def test_paged_memory_does_not_grow_from_visit_to_visit(even_base: Path) -> None:
    """Tensors of at least 1e5 elements are paged, and bitsandbytes never frees them."""
    from bitsandbytes.functional import GlobalPageManager

    lora = LoraSpec(1024, 1024.0, "q_proj,v_proj,gate_proj", 0.0)
    visit(even_base, checkpointing=False, optimizer="paged_adamw_8bit", lora=lora)
    paged = len(GlobalPageManager.get_instance().paged_tensors)
    for _ in range(3):
        visit(even_base, checkpointing=False, optimizer="paged_adamw_8bit", lora=lora)
    assert len(GlobalPageManager.get_instance().paged_tensors) == paged


def test_the_precision_is_that_of_the_device(tiny_base: Path) -> None:
    resident = resident_model(BaseSpec(str(tiny_base), 0, "auto"), LORA)
    expected = torch.bfloat16 if has_bfloat16() else torch.float32
    assert resident.model.get_base_model().lm_head.weight.dtype == expected


# --- Attention ------------------------------------------------------------------------------------

AT_ONCE, ONE_BY_ONE = PATHS
HEADS = {
    "Llama 3 8B": (32, 8, 128),
    "Qwen 2.5 0.5B": (14, 2, 64),
    "Phi 3 mini": (32, 32, 96),
    "a head of 256": (16, 8, 256),
    "the tiny base": (4, 2, 8),
}
takes_rows = pytest.mark.skipif(not has_bfloat16(), reason="no FlashAttention for rows")


@takes_rows
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", HEADS)
def test_one_call_a_layer_is_as_exact_as_one_a_sequence(
    base: str, dtype: torch.dtype, windowed: bool
) -> None:
    heads, key_value_heads, size = HEADS[base]
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer(device, dtype, heads, key_value_heads, size, size, windowed=windowed)
    for own, known in zip(errors(AT_ONCE, layer), errors(ONE_BY_ONE, layer), strict=True):
        assert own <= ERROR_FACTOR * known
    assert path_of(layer) is AT_ONCE


@takes_rows
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_train_as_eager_float32_does(
    tiny_base: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one call a layer, by one a sequence, and with a tail: none is further from the truth."""

    def gradients(dtype: str, how: Forward, implementation: str = "") -> tuple[float, torch.Tensor]:
        resident = resident_model(BaseSpec(str(tiny_base), 0, dtype), LORA)
        checkpoint_activations(resident, checkpointing)
        resident.model.train().zero_grad()
        config = resident.model.get_base_model().config
        config._attn_implementation = implementation or "sdpa"
        torch.manual_seed(0)
        for parameter in resident.parameters.values():
            torch.nn.init.normal_(parameter, std=0.3)
        with attending(resident.model, how):
            loss = answer_nll_sum(resident.model, EXAMPLES, 0, resident.device, how)
            loss.backward()  # type: ignore[no-untyped-call]
        parts = [p.grad.flatten() for p in resident.parameters.values() if p.grad is not None]
        checkpoint_activations(resident, False)
        return float(loss.detach()), torch.cat(parts).double()

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, exact = gradients("float32", Forward(False, False, False, 0), "eager")
    torch.backends.cuda.matmul.allow_tf32 = before

    def off(bucket_tokens: int = 1) -> tuple[float, float]:
        how = Forward(True, True, True, 0, bucket_tokens=bucket_tokens)
        found, own = gradients("bfloat16", how)
        return abs(found - loss) / loss, float((own - exact).norm() / exact.norm())

    monkeypatch.setattr(attention, "_paths", {})
    at_once, with_tail = off(), off(bucket_tokens=4)
    assert set(attention._paths.values()) == {AT_ONCE}
    monkeypatch.setattr(attention, "PATHS", (ONE_BY_ONE,))
    monkeypatch.setattr(attention, "_paths", {})
    one_by_one = off()
    for found in (at_once, with_tail):
        assert found[0] < max(2e-3, 2 * one_by_one[0])  # one number, which may be right by luck
        assert found[1] < 1.5 * one_by_one[1]


@takes_rows
def test_a_visit_counts_its_tails(tiny_base: Path) -> None:
    """A tail is shorter than a 16th of its row: 72 tokens are a multiple of 4 as they are, and 63
    get one more, to a multiple of 2."""
    resident = resident_model(BaseSpec(str(tiny_base), 0, "auto"), LORA)
    parameters = list(resident.parameters.values())
    how = Forward(True, True, True, 1024, bucket_tokens=256)
    settings = VisitSettings(1, VisitSchedule(1e-3, 2), "adamw_torch", 0.0, 1.0, 0.01, how, 1)
    result = train_visit(resident.model, parameters, [EXAMPLES, EXAMPLES[:3]], settings, 0)
    assert (result.tokens, result.padding_tokens) == (135, 1)
