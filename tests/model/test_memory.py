"""Memory of sites and server: by hand, and against what bitsandbytes really allocates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from grandrounds.model.activations import Batch, Precision
from grandrounds.model.architectures import find_architecture
from grandrounds.model.memory import (
    CUDA_CONTEXT_BYTES,
    NF4_BYTES_PER_WEIGHT,
    _site_memory,
    base_bytes,
    dequantized_bytes,
    optimizer_bytes,
    server_bytes,
    weight_copies_bytes,
)

LLAMA = find_architecture("meta-llama/Meta-Llama-3-8B")
LINEAR = 32 * (2 * 4_096 * 4_096 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336)
REST = 8_030_261_248 - LINEAR


def test_the_base_of_llama_3_8b_by_hand() -> None:
    """6,979,321,856 linear weights; 2 * 128,256 * 4,096 + 65 * 4,096 other numbers. LLM.int8 has a
    float32 scale for each of 32 * (2 * 4,096 + 2 * 1,024 + 2 * 14,336 + 4,096) ... outputs."""
    assert LINEAR == 6_979_321_856
    assert REST == 2 * 128_256 * 4_096 + 65 * 4_096
    outputs = 32 * (4_096 + 1_024 + 1_024 + 4_096 + 14_336 + 14_336 + 4_096)
    assert base_bytes(LLAMA, Precision(0, 4, False)) == 4 * 8_030_261_248
    assert base_bytes(LLAMA, Precision(0, 2, True)) == 2 * 8_030_261_248
    assert base_bytes(LLAMA, Precision(8, 2, True)) == LINEAR + 4 * outputs + 2 * REST
    assert base_bytes(LLAMA, Precision(4, 2, True)) == round(LINEAR * 4.126953125 / 8) + 2 * REST


def test_nf4_takes_the_bytes_that_bitsandbytes_allocates() -> None:
    """A weight of 256 x 256: codes, 8-bit scales, float32 scales of the scales; the tables of 16
    and 256 values that come with each weight, and its offset, are left out."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(256, 256)
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parts = (codes, state.absmax, state.state2.absmax)
    real = sum(part.numel() * part.element_size() for part in parts)
    assert NF4_BYTES_PER_WEIGHT * weight.numel() == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize("shape", [(8, 4_096), (8, 100), (1_000, 7)])
def test_8_bit_moments_take_the_bytes_that_bitsandbytes_allocates(shape: tuple[int, int]) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer: Any = optim.AdamW8bit([parameter])
    parameter.grad = torch.ones(shape)
    optimizer.step()
    state = optimizer.state[parameter]
    parts = [state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state]
    real = sum(part.numel() * part.element_size() for part in parts)
    assert optimizer_bytes([parameter.numel()], "adamw_8bit") == real


def test_float32_moments_take_8_bytes_a_number() -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 7))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(6, 7)
    optimizer.step()
    state = optimizer.state[parameter]
    real = sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    assert optimizer_bytes([42], "adamw_torch") == real == 8 * 42


def test_the_largest_weight_is_unpacked_where_it_is_quantised() -> None:
    assert dequantized_bytes(LLAMA, Precision(4, 2, True)) == 2 * 4_096 * 14_336
    assert dequantized_bytes(LLAMA, Precision(0, 2, True)) == 0


def test_autocast_copies_float32_weights_and_only_those() -> None:
    head = 2 * 128_256 * 4_096
    assert weight_copies_bytes(LLAMA, Precision(0, 4, True), False) == 2 * LINEAR + head
    assert weight_copies_bytes(LLAMA, Precision(0, 4, True), True) == 2 * LINEAR // 32 + head
    assert weight_copies_bytes(LLAMA, Precision(0, 2, True), False) == 0
    assert weight_copies_bytes(LLAMA, Precision(0, 4, False), False) == 0


def jsl(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "optimizer": "adamw_torch",
        "checkpointing": True,
        "dropout": True,
        "proximal": False,
        **changes,
    }
    tensors = [8 * 4_096, 8 * 4_096, 8 * 4_096, 8 * 1_024] * 32
    return _site_memory(
        LLAMA,
        ["q_proj", "v_proj"],
        tensors,
        tensors,
        8,
        Batch(16, 512),
        Precision(4, 2, True),
        **given,
    )


def test_a_sites_memory_is_the_sum_of_its_parts() -> None:
    """3,407,872 numbers: adapter twice, gradient, two moments, of 4 bytes each; with a proximal
    term another 4. Kept: 32 inputs of 8,192 * 4,096 * 2 bytes, one of the step before, and the last
    norm's."""
    memory = jsl()
    assert memory.total == sum(asdict(memory).values())
    assert memory.cuda_context == CUDA_CONTEXT_BYTES
    assert memory.adapter == 8 * 3_407_872
    assert memory.gradient == 4 * 3_407_872
    assert memory.optimizer == 8 * 3_407_872
    assert memory.activations == 33 * 8_192 * 4_096 * 2 + 4 * 8_192 * 4_097
    assert jsl(proximal=True).gradient == 8 * 3_407_872


def test_checkpointing_saves_activations_and_a_head_on_answers_saves_logits() -> None:
    memory = jsl()
    assert jsl(checkpointing=False).activations > 10 * memory.activations
    full = jsl(chunk_tokens=None).working
    assert jsl(chunk_tokens=0).working < full
    assert jsl(chunk_tokens=1_024).working < jsl(chunk_tokens=0).working


def test_the_servers_memory_grows_with_the_cohort_only_where_replies_are_kept() -> None:
    """1,000 numbers of 4 bytes: four adapters and two float64 sums of 8 bytes, or ten replies."""
    given = {"keeps_replies": False, "measures_product": False}
    assert server_bytes(1_000, cohort=3, **given) == 32_000
    assert server_bytes(1_000, cohort=64, **given) == 32_000
    assert server_bytes(1_000, cohort=10, keeps_replies=True, measures_product=True) == 60_000
    assert server_bytes(1_000, cohort=3, sites_remembered=20, **given) == 112_000
