"""Predicted activations against the tensors that small real models save for the backward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from grandrounds.model.activations import Batch, Precision, layer_bytes, loss_bytes, saved_bytes
from grandrounds.model.architectures import find_architecture, from_config
from grandrounds.model.attention import by_sequence

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

BATCH = Batch(examples=4, tokens=48)

CPU_MASK_BYTES = 4
"""Dropout on a CPU keeps its mask as float32; on a GPU as one byte."""

FLOAT32 = Precision(0, 4, autocast=False)
BFLOAT16 = Precision(0, 2, autocast=False)
MIXED = Precision(0, 2, autocast=True)


def counted_bytes(
    model_type: str,
    targets: list[str],
    precision: Precision,
    *,
    checkpointing: bool = False,
    dropout: float = 0.0,
    with_loss: bool = False,
    padding_free: bool = False,
) -> tuple[int, Any]:
    """Return the bytes of all storages saved for the backward pass, and the model's configuration.

    A storage counts once, and the model's own parameters not at all.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](
        vocab_size=500,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16 if precision.base_bytes == 2 else torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            saved.setdefault(place, tensor)
        return tensor

    tokens = torch.randint(3, 500, (BATCH.examples, BATCH.tokens))
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision.autocast else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast or contextlib.nullcontext():
            if padding_free:
                row = {"input_ids": tokens.view(1, -1), "sequence_lengths": [BATCH.tokens] * 4}
                positions = torch.arange(BATCH.tokens).repeat(1, BATCH.examples)
                with by_sequence(model.get_base_model()):
                    model(**row, position_ids=positions, use_cache=False)
            else:
                logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        if with_loss:
            predictions = logits.flatten(0, 1).float()
            torch.nn.functional.cross_entropy(predictions, tokens.flatten(), reduction="sum")
    return sum(t.untyped_storage().nbytes() for t in saved.values()), config


def predicted_bytes(
    config: Any,
    targets: list[str],
    precision: Precision,
    *,
    checkpointing: bool = False,
    dropout: float = 0.0,
    padding_free: bool = False,
) -> int:
    return saved_bytes(
        from_config("tiny", config.to_dict(), "tiny"),
        targets,
        4,
        dataclasses.replace(BATCH, padded=not padding_free),
        precision,
        checkpointing=checkpointing,
        dropout=dropout > 0,
        mask_bytes=CPU_MASK_BYTES,
    )


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, MIXED], ids=["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL_SEVEN], ids=["q,v", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_llamas_saved_bytes_are_predicted_within_2_percent(
    precision: Precision, targets: list[str], dropout: float
) -> None:
    counted, config = counted_bytes("llama", targets, precision, dropout=dropout)
    predicted = predicted_bytes(config, targets, precision, dropout=dropout)
    assert predicted == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, MIXED], ids=["fp32", "bf16", "mixed"])
def test_with_checkpointing_only_the_inputs_of_layers_are_kept(precision: Precision) -> None:
    counted, config = counted_bytes("llama", ALL_SEVEN, precision, checkpointing=True)
    assert predicted_bytes(config, ALL_SEVEN, precision, checkpointing=True) == counted


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("qwen2", ["q_proj", "v_proj"]),
        ("qwen3", ["q_proj", "v_proj"]),
        ("mistral", ALL_SEVEN),
        ("phi3", FUSED),
    ],
)
@pytest.mark.parametrize("precision", [FLOAT32, MIXED], ids=["fp32", "mixed"])
def test_other_families_are_predicted_within_10_percent(
    model_type: str, targets: list[str], precision: Precision
) -> None:
    counted, config = counted_bytes(model_type, targets, precision)
    assert predicted_bytes(config, targets, precision) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("precision", [FLOAT32, MIXED], ids=["fp32", "mixed"])
def test_gemma_2_keeps_its_attention_matrices_and_its_capped_logits(precision: Precision) -> None:
    counted, config = counted_bytes("gemma2", ["q_proj", "v_proj"], precision)
    capped_logits = BATCH.positions * 500 * precision.product_bytes
    predicted = predicted_bytes(config, ["q_proj", "v_proj"], precision) + capped_logits
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL_SEVEN], ids=["q,v", "all"])
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, MIXED], ids=["fp32", "bf16", "mixed"])
def test_batches_without_padding_are_predicted_within_3_percent(
    precision: Precision, targets: list[str]
) -> None:
    counted, config = counted_bytes("llama", targets, precision, padding_free=True)
    predicted = predicted_bytes(config, targets, precision, padding_free=True)
    assert predicted == pytest.approx(counted, rel=0.03)


def test_the_loss_keeps_its_log_softmax_in_float32() -> None:
    """Of loss_bytes' N V (e + 8), N V 4 are kept for the backward pass; the rest comes and goes."""
    without, _ = counted_bytes("llama", ["q_proj"], FLOAT32)
    with_it, _ = counted_bytes("llama", ["q_proj"], FLOAT32, with_loss=True)
    kept = 4 * BATCH.positions * 500
    assert with_it - without == pytest.approx(kept, rel=0.01)


def test_loss_bytes_by_hand() -> None:
    """8,192 tokens of 128,256 words: 10 bytes each in bfloat16, 10,506,731,520. Of answers only,
    1,024 at a time: 6 bytes each, and (2 * 8,192 + 1,024) 4,096 hidden numbers of 2 bytes."""
    base, batch = find_architecture("meta-llama/Meta-Llama-3-8B"), Batch(16, 512)
    assert loss_bytes(base, batch, MIXED, None) == 10_506_731_520
    lean = 1_024 * 128_256 * 6 + 17_408 * 4_096 * 2
    assert loss_bytes(base, batch, MIXED, 1_024) == lean
    assert loss_bytes(base, batch, MIXED, 0) == 8_192 * 128_256 * 6 + 3 * 8_192 * 4_096 * 2
    assert loss_bytes(base, Batch(1, 100), MIXED, 1_024) == 100 * 128_256 * 6 + 300 * 4_096 * 2


def test_llm_int8_keeps_the_inputs_of_frozen_modules() -> None:
    """Per token of Llama-3-8B 2 bytes of both norms' outputs and of the MLP's product: 2 (2 * 4,096
    + 14,336) more than without."""
    base, batch = find_architecture("meta-llama/Meta-Llama-3-8B"), Batch(1, 16)
    plain, int8 = (
        layer_bytes(base, ["q_proj"], 8, batch, Precision(bits, 2, autocast=True), dropout=False)
        for bits in (0, 8)
    )
    assert int8 - plain == 16 * 2 * (2 * 4_096 + 14_336)
