"""Planned memory: by hand, against the tensors that small real models save for the backward pass,
and against what bitsandbytes allocates."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from grandrounds.config import recipes
from grandrounds.model import fused
from grandrounds.model.architectures import find_architecture, from_config
from grandrounds.model.attention import by_sequence
from grandrounds.model.memory import (
    CUDA_CONTEXT_BYTES,
    NF4_BYTES_PER_WEIGHT,
    Batch,
    Precision,
    SiteMemory,
    Workload,
    optimizer_bytes,
    server_bytes,
    site_memory,
)

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

BATCH = Batch(examples=4, tokens=48)

CPU_MASK_BYTES = 4
"""Dropout on a CPU keeps its mask as float32; on a GPU as one byte."""

FLOAT32 = Precision(0, 4, autocast=False)
BFLOAT16 = Precision(0, 2, autocast=False)
MIXED = Precision(0, 2, autocast=True)

LLAMA = find_architecture("meta-llama/Meta-Llama-3-8B")


def llama(precision: Precision) -> Workload:
    """Return a padded batch of 16 x 512 tokens on Llama-3-8B."""
    return Workload(LLAMA, ["q_proj", "v_proj"], 8, Batch(16, 512), precision)


def counted_bytes(
    model_type: str,
    targets: list[str],
    precision: Precision,
    *,
    checkpointing: bool | int = False,
    dropout: float = 0.0,
    with_loss: bool = False,
    padding_free: bool = False,
    dora: bool = False,
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
        for place, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = checkpointing is True or place < checkpointing
    lora = LoraConfig(
        r=4, lora_dropout=dropout, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )
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
    pieces = fused.prepared(model).standing_in(tuple(precision.fused))
    with pieces, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
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
    checkpointing: bool | int = False,
    dropout: float = 0.0,
    padding_free: bool = False,
    dora: bool = False,
) -> int:
    workload = Workload(
        from_config("tiny", config.to_dict(), "tiny"),
        targets,
        4,
        dataclasses.replace(BATCH, padded=not padding_free),
        precision,
        dropout_mask_bytes=(1 if precision.fused else CPU_MASK_BYTES) if dropout > 0 else 0,
        dora=dora,
    )
    return workload.saved_bytes(checkpointing)


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
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_dora_saves_is_predicted_within_2_percent(
    precision: Precision, dropout: float
) -> None:
    """The count holds on to what PEFT frees at once: the identity, and A of it, of each module."""
    counted, config = counted_bytes("llama", ALL_SEVEN, precision, dropout=dropout, dora=True)
    inputs = [64, 64, 64, 64, 64, 64, 176]
    freed = 3 * sum(n * n + 4 * n for n in inputs) * precision.adapter_input_bytes
    predicted = predicted_bytes(config, ALL_SEVEN, precision, dropout=dropout, dora=True)
    assert predicted == pytest.approx(counted - freed, rel=0.02)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, MIXED], ids=["fp32", "bf16", "mixed"])
def test_with_checkpointing_only_the_inputs_of_layers_are_kept(precision: Precision) -> None:
    counted, config = counted_bytes("llama", ALL_SEVEN, precision, checkpointing=True)
    assert predicted_bytes(config, ALL_SEVEN, precision, checkpointing=True) == counted


def test_of_the_other_layers_everything_is_kept() -> None:
    for layers in (1, 2):
        counted, config = counted_bytes("llama", ALL_SEVEN, MIXED, checkpointing=layers)
        predicted = predicted_bytes(config, ALL_SEVEN, MIXED, checkpointing=layers)
        assert predicted == pytest.approx(counted, rel=0.02)


def test_checkpointed_layers_by_hand() -> None:
    """Of Llama-3-8B's 32, k keep an input of 8,192 * 4,096 * 2 bytes; the last norm 4 bytes."""
    workload = llama(MIXED)
    layer, norm = workload.layer_bytes(), 4 * 8_192 * 4_097
    for k in (1, 16, 31, 32):
        assert workload.saved_bytes(k) == k * 67_108_864 + (32 - k) * layer + norm
    assert workload.saved_bytes(True) == workload.saved_bytes(32)
    assert workload.saved_bytes(False) == 31 * layer + workload.layer_bytes(first=True) + norm
    # Where the last layer is kept, none is recomputed beside all that is kept.
    assert workload.backward_bytes(31) == workload.backward_bytes(False)
    assert workload.backward_bytes(32) > workload.backward_bytes(31)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL_SEVEN], ids=["q,v", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_fused_lora_modules_save_is_predicted_within_2_percent(
    targets: list[str], dropout: float
) -> None:
    """Their input as it is, and a byte for each value that dropout may drop."""
    precision = dataclasses.replace(MIXED, fused=frozenset({fused.LORA}))
    counted, config = counted_bytes("llama", targets, precision, dropout=dropout)
    predicted = predicted_bytes(config, targets, precision, dropout=dropout)
    assert predicted == pytest.approx(counted, rel=0.02)
    assert predicted < predicted_bytes(config, targets, MIXED, dropout=dropout)


def test_what_fused_kernels_and_grouped_heads_save_by_hand() -> None:
    """A layer of Llama-3-8B in NF4 without padding, per token: two norms' inputs in two bytes with
    an inverse root, 2 (8,192 + 4); queries, keys, values and output, 2 (2 * 4,096 + 2 * 1,024),
    and 4 for each of 32 heads; gate and up, 2 * 2 * 14,336; the input of A, which q and v share,
    8,192; and 2 r of each B's."""
    pieces = frozenset(fused.PIECES)
    precision = Precision(4, 2, autocast=True, grouped_heads=True, fused=pieces)
    workload = dataclasses.replace(llama(precision), batch=Batch(16, 512, padded=False))
    per_token = 16_392 + 20_480 + 128 + 57_344 + 8_192 + 32
    assert workload.layer_bytes() == 8_192 * per_token
    assert workload.layer_bytes(first=True) == 8_192 * (per_token - 8_196)
    assert workload.backward_bytes(False) == 8_192 * (14_336 + 2 * 4_096) * 2
    plain = dataclasses.replace(
        workload, precision=dataclasses.replace(precision, fused=frozenset())
    )
    assert plain.layer_bytes() - workload.layer_bytes() == 8_192 * (2 * 8_192 + 28_672)
    # 218,103,808 linear weights a layer: kept in two bytes, or their scales in 4 bytes per 64, and
    # the largest of them, 4,096 x 14,336, for its product.
    assert workload.kept_bytes(32) == 32 * 2 * 218_103_808
    assert workload.kept_bytes(30) == 30 * 2 * 218_103_808 + 2 * 13_631_488 + 117_440_512
    assert plain.kept_bytes(0) == 117_440_512
    repeated = dataclasses.replace(plain.precision, grouped_heads=False)
    more = dataclasses.replace(plain, precision=repeated).layer_bytes() - plain.layer_bytes()
    assert more == 8_192 * 2 * 2 * 3_072


@pytest.mark.parametrize(("checkpointing", "measured_gib"), [(False, 42.3), (True, 9.26)])
def test_the_peak_measured_on_a_gpu_is_planned_within_5_percent(
    checkpointing: bool, measured_gib: float
) -> None:
    """One H200 (docs/planning.md), without fused kernels."""
    changes = {
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "model.lora.dropout": 0.0,
        "train.batching": "auto",
        "train.response-only-logits": True,
    }
    planned = jsl(checkpointing=checkpointing, **changes)
    gib = (planned.total - planned.cuda_context) / 2**30
    assert gib == pytest.approx(measured_gib, rel=0.05)


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
    workload = llama(MIXED)
    assert workload.loss_bytes(None) == 10_506_731_520
    assert workload.loss_bytes(1_024) == 1_024 * 128_256 * 6 + 17_408 * 4_096 * 2
    assert workload.loss_bytes(0) == 8_192 * 128_256 * 6 + 3 * 8_192 * 4_096 * 2
    short = dataclasses.replace(workload, batch=Batch(1, 100))
    assert short.loss_bytes(1_024) == 100 * 128_256 * 6 + 300 * 4_096 * 2


def test_llm_int8_keeps_the_inputs_of_frozen_modules() -> None:
    """Per token of Llama-3-8B 2 bytes of both norms' outputs and of the MLP's product: 2 (2 * 4,096
    + 14,336) more than without."""
    plain, int8 = (llama(Precision(bits, 2, autocast=True)).layer_bytes() for bits in (0, 8))
    assert int8 - plain == 8_192 * 2 * (2 * 4_096 + 14_336)


# --- By hand, and against bitsandbytes ------------------------------------------------------------


LINEAR = 32 * (2 * 4_096 * 4_096 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336)
REST = 8_030_261_248 - LINEAR


def test_the_base_of_llama_3_8b_by_hand() -> None:
    """6,979,321,856 linear weights; 2 * 128,256 * 4,096 + 65 * 4,096 other numbers. LLM.int8 has a
    float32 scale for each of 32 * (2 * 4,096 + 2 * 1,024 + 2 * 14,336 + 4,096) ... outputs."""
    assert LINEAR == 6_979_321_856
    assert REST == 2 * 128_256 * 4_096 + 65 * 4_096
    outputs = 32 * (4_096 + 1_024 + 1_024 + 4_096 + 14_336 + 14_336 + 4_096)
    assert llama(Precision(0, 4, False)).base_bytes == 4 * 8_030_261_248
    assert llama(Precision(0, 2, True)).base_bytes == 2 * 8_030_261_248
    assert llama(Precision(8, 2, True)).base_bytes == LINEAR + 4 * outputs + 2 * REST
    assert llama(Precision(4, 2, True)).base_bytes == round(LINEAR * 4.126953125 / 8) + 2 * REST


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
    assert llama(Precision(4, 2, True)).dequantized_bytes == 2 * 4_096 * 14_336
    assert llama(Precision(0, 2, True)).dequantized_bytes == 0


def test_autocast_copies_float32_weights_and_only_those() -> None:
    head = 2 * 128_256 * 4_096
    assert llama(Precision(0, 4, True)).weight_copies_bytes(False) == 2 * LINEAR + head
    assert llama(Precision(0, 4, True)).weight_copies_bytes(True) == 2 * LINEAR // 32 + head
    assert llama(Precision(0, 2, True)).weight_copies_bytes(False) == 0
    assert llama(Precision(0, 4, False)).weight_copies_bytes(False) == 0


def jsl(*, checkpointing: bool = True, **changes: Any) -> SiteMemory:
    """Return the memory of a padded 4-bit visit of rank 8, with dropout and all logits."""
    settings = {
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "model.name": "meta-llama/Meta-Llama-3-8B",
        "model.lora.peft-lora-r": 8,
        "model.lora.dropout": 0.1,
        "train.batching": "padded",
        "train.response-only-logits": False,
        "train.training-arguments.per-device-train-batch-size": 16,
        **changes,
    }
    config = recipes.resolve(settings)
    precision = Precision(4, 2, True, grouped_heads=True)
    return site_memory(config, LLAMA, ["q_proj", "v_proj"], precision, checkpointing=checkpointing)


def test_a_preference_takes_the_memory_of_two_examples() -> None:
    dpo = {"train.objective": "dpo", "static.dataset.name": "pairs.jsonl"}
    batch = "train.training-arguments.per-device-train-batch-size"
    assert jsl(**dpo, **{batch: 4}) == jsl(**{batch: 8})


def test_a_sites_memory_is_the_sum_of_its_parts() -> None:
    """3,407,872 numbers: adapter twice, gradient, two moments, of 4 bytes each; with a proximal
    term another 4. Kept: 32 inputs of 8,192 * 4,096 * 2 bytes, one of the step before, and the last
    norm's."""
    memory = jsl()
    assert memory.total == sum(dataclasses.asdict(memory).values())
    assert memory.cuda_context == CUDA_CONTEXT_BYTES
    assert memory.adapter == 8 * 3_407_872
    assert memory.gradient == 4 * 3_407_872
    assert memory.optimizer == 8 * 3_407_872
    assert memory.activations == 33 * 8_192 * 4_096 * 2 + 4 * 8_192 * 4_097
    assert (
        jsl(**{"strategy.name": "fedprox", "strategy.proximal-mu": 0.1}).gradient == 8 * 3_407_872
    )


def test_checkpointing_saves_activations_and_a_head_on_answers_saves_logits() -> None:
    memory = jsl()
    assert jsl(checkpointing=False).activations > 10 * memory.activations
    whole, chunked = (
        jsl(**{"train.response-only-logits": True, "train.logits-chunk-tokens": chunk}).working
        for chunk in (0, 1_024)
    )
    assert chunked < whole < memory.working


def test_the_servers_memory_grows_with_the_cohort_only_where_replies_are_kept() -> None:
    """1,000 numbers of 4 bytes: four adapters and two float64 sums of 8 bytes, or ten replies."""
    given = {"keeps_replies": False, "measures_product": False}
    assert server_bytes(1_000, cohort=3, **given) == 32_000
    assert server_bytes(1_000, cohort=64, **given) == 32_000
    assert server_bytes(1_000, cohort=10, keeps_replies=True, measures_product=True) == 60_000
    assert server_bytes(1_000, cohort=3, sites_remembered=20, **given) == 112_000
