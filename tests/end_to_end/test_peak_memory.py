"""The planned peak of a visit against every allocation that PyTorch makes on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from grandrounds.config import recipes
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.architectures import from_config
from grandrounds.model.base import BaseSpec, load_base
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.memory import Batch, Precision, Workload, site_memory
from grandrounds.model.resident import Resident, checkpoint_activations
from grandrounds.site.private.coins import KeyedCoins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.visit import PrivateSettings, train_private_visit
from grandrounds.site.training import VisitSettings, train_visit
from grandrounds.wire.schedule import VisitSchedule
from tests.places import ROOT

SCRIPT = ROOT / "benchmarks" / "peak_memory.py"
QUERY_VALUE = ["q_proj", "v_proj"]
ALL_SEVEN = [*QUERY_VALUE, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

DEEP = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 8,
    "vocab_size": 8_000,
    "num_key_value_heads": 4,
}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "vocab_size": 2_000,
    "num_key_value_heads": 2,
}


def counted(function: Any) -> tuple[int, int]:
    """Return what `benchmarks/peak_memory.py` counts: bytes at the peak, and left at the end."""
    spec = importlib.util.spec_from_file_location("peak_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peak, left = module.peak_and_left_bytes(function)
    return int(peak), int(left)


def measured_and_planned(
    shape: dict[str, int],
    targets: list[str],
    how: Forward,
    *,
    checkpointing: bool | int,
    dtype: torch.dtype = torch.float32,
    microbatch: int = 0,
    dora: bool = False,
) -> tuple[int, int]:
    """Return the bytes that a visit takes beside the model, as counted and as planned.

    Parameters
    ----------
    microbatch : int
        Records of a microbatch of a private visit; 0: a plain visit.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_attention_heads=4, pad_token_id=0)
    base = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    lora = LoraConfig(r=8, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    resident = Resident(None, None, model, {})  # type: ignore[arg-type]
    checkpoint_activations(resident, checkpointing)
    rng, examples, tokens = np.random.default_rng(0), 8, 96
    batch = [
        TokenizedExample(tuple(int(i) for i in rng.integers(1, shape["vocab_size"], tokens)), 1)
        for _ in range(examples)
    ]
    settings = VisitSettings(1, VisitSchedule(1e-3, 0), "adamw_torch", 0.0, 1.0, 0.01, how, 1)

    def visit(steps: int = 2) -> None:
        if microbatch:
            mechanism = Mechanism(1.0, 1.0, 1.0, examples, steps, visits=1, delta=1e-5)
            how_private = PrivateSettings(mechanism, microbatch, settings)
            units, coins = [[record] for record in batch], KeyedCoins(bytes(32))
            train_private_visit(model, parameters, units, how_private, 0, coins)
            return
        train_visit(model, parameters, [batch] * steps, settings, 0)

    visit(1)  # allocates what stays afterwards, such as the tables of rotary embeddings
    settings_of_plan = {
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "model.lora.peft-lora-r": 8,
        "model.lora.peft-use-dora": dora,
        "train.batching": "padding-free" if how.padding_free else "padded",
        "train.response-only-logits": how.answers_only,
        "train.logits-chunk-tokens": how.chunk_tokens,
        "train.seq-length": tokens,
        "train.training-arguments.per-device-train-batch-size": microbatch or examples,
    }
    if microbatch:
        settings_of_plan |= {
            "privacy.unit-guarantee": "example",
            "privacy.noise-multiplier": 1.0,
            "privacy.declared-units": examples,
        }
    memory = site_memory(
        recipes.resolve(settings_of_plan),
        from_config("tiny", config.to_dict(), "tiny"),
        targets,
        Precision(0, dtype.itemsize, autocast=False),
        checkpointing=checkpointing,
    )
    received_bytes = 4 * sum(p.numel() for p in parameters)
    there_before = memory.base + memory.cuda_context + received_bytes
    return counted(visit)[0], memory.total - there_before


@pytest.mark.parametrize("checkpointing", [False, 2, True])
@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("targets", [QUERY_VALUE, ALL_SEVEN], ids=["q,v", "all"])
@pytest.mark.parametrize(
    "shape", [pytest.param(DEEP, marks=pytest.mark.slow), WIDE], ids=["deep", "wide"]
)
@pytest.mark.slow
def test_a_visit_without_padding_takes_what_is_planned_and_hardly_less(
    shape: dict[str, int], targets: list[str], chunk: int, checkpointing: bool | int
) -> None:
    how = Forward(False, padding_free=True, answers_only=True, chunk_tokens=chunk)
    measured, planned = measured_and_planned(shape, targets, how, checkpointing=checkpointing)
    assert 0.99 <= planned / measured <= 1.12


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_visit_with_dora_takes_what_is_planned(checkpointing: bool) -> None:
    how = Forward(False, padding_free=True, answers_only=True, chunk_tokens=64)
    measured, planned = measured_and_planned(
        WIDE, ALL_SEVEN, how, checkpointing=checkpointing, dora=True
    )
    assert 0.99 <= planned / measured <= 1.12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "microbatch"), [(QUERY_VALUE, 2), (ALL_SEVEN, 8)], ids=["q,v", "all"]
)
def test_a_private_visit_takes_what_is_planned_by_microbatch(
    targets: list[str], microbatch: int
) -> None:
    how = Forward(False, padding_free=True, answers_only=True, chunk_tokens=64)
    measured, planned = measured_and_planned(
        DEEP, targets, how, checkpointing=False, microbatch=microbatch
    )
    assert 0.95 <= planned / measured <= 1.12


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("answers_only", [True, False])
@pytest.mark.slow
def test_other_means_take_no_more_than_planned(padding_free: bool, answers_only: bool) -> None:
    """A padded batch of examples that are all as long needs no mask, which the plan counts."""
    how = Forward(False, padding_free, answers_only, 0)
    measured, planned = measured_and_planned(WIDE, QUERY_VALUE, how, checkpointing=False)
    assert 0.99 <= planned / measured <= 1.15


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_llm_int8_keeps_is_planned_for_with_checkpointing_too(
    tmp_path: Path, checkpointing: bool
) -> None:
    """Bytes that are held between forward and backward, beyond those of a base without it."""
    config = LlamaConfig(**WIDE, num_attention_heads=4, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokens, how = (8, 96), Forward(False, padding_free=True, answers_only=True, chunk_tokens=64)
    batch = [TokenizedExample((5,) * tokens[1], 1)] * tokens[0]

    def held(bits: int) -> int:
        base = load_base(BaseSpec(str(tmp_path), bits, "float32"))
        lora = LoraConfig(r=8, target_modules=QUERY_VALUE, task_type="CAUSAL_LM")
        model = get_peft_model(base, lora).train()
        checkpoint_activations(Resident(None, None, model, {}), checkpointing)  # type: ignore[arg-type]
        device = torch.device("cpu")
        with attending(model, how):
            answer_nll_sum(model, batch, 0, device, how).backward()  # tables are made once
            kept: list[torch.Tensor] = []
            return counted(lambda: kept.append(answer_nll_sum(model, batch, 0, device, how)))[1]

    planned = [
        Workload(
            from_config("tiny", config.to_dict(), "tiny"),
            QUERY_VALUE,
            8,
            Batch(*tokens, padded=False),
            Precision(bits, 4, autocast=False),
        ).saved_bytes(checkpointing)
        for bits in (8, 0)
    ]
    assert planned[0] - planned[1] == pytest.approx(held(8) - held(0), rel=0.02)


def test_the_lean_means_save_what_the_plan_says() -> None:
    lean = Forward(False, padding_free=True, answers_only=True, chunk_tokens=64)
    full = Forward(False, padding_free=True, answers_only=False, chunk_tokens=0)
    (a, planned_a), (b, planned_b) = (
        measured_and_planned(DEEP, QUERY_VALUE, how, checkpointing=False) for how in (lean, full)
    )
    assert a < b
    assert (planned_b - planned_a) / (b - a) == pytest.approx(1, abs=0.05)
