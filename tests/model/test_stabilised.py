"""Rank-stabilised LoRA: one scale in training, in evaluation, in a merged model and in PEFT."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from grandrounds.config.recipes import resolve
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec, module_of
from grandrounds.model.machine import specs
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.model.saved import lora_spec
from grandrounds.study.export import merge

SPEC = LoraSpec(9, 6.0, "q_proj,v_proj", 0.0, stabilised=True)


def test_the_scale_is_alpha_over_the_root_of_the_rank_and_stays() -> None:
    assert SPEC.scale_of("q_proj") == 2.0
    assert SPEC.at_rank(36).scale_of("q_proj") == pytest.approx(2.0, rel=1e-15)
    assert SPEC.at_rank(36).alpha == 12.0
    plain = LoraSpec(8, 16.0, "q_proj", 0.0)
    assert plain.at_rank(32) == LoraSpec(32, 64.0, "q_proj", 0.0)
    config = resolve({"model.lora.use-rslora": True, "model.lora.peft-lora-alpha": 16})
    assert config.lora.scales == (scale := 16 / math.sqrt(16), scale)
    assert specs(config)[1].scale_of("q_proj") == scale


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made and saved with `use_rslora`."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = get_peft_model(
        base,
        LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder := tmp_path_factory.mktemp("rslora"))
    return folder


def test_loss_gradients_and_merged_weights_are_those_of_peft(tiny_base: Path, saved: Path) -> None:
    from safetensors.numpy import load_file

    spec = lora_spec(saved)
    assert (spec.rank, spec.alpha, spec.scale_of("q_proj")) == (9, 6.0, 2.0)
    adapter = load_file(saved / "adapter_model.safetensors")
    resident = resident_model(BaseSpec(str(tiny_base), 0, "float32"), spec)
    set_adapter(resident, adapter)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), saved, is_trainable=True
    )
    ids = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    losses = []
    for model in (resident.model, theirs):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = {n.replace(".default.", "."): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in resident.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)
    resident.model.zero_grad()
    merged = AutoModelForCausalLM.from_pretrained(tiny_base)
    scales = {name: spec.scale_of(module_of(name)) for name in adapter}
    merge(merged, adapter, scales, torch.float32)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        np.testing.assert_allclose(
            weight.detach().numpy(), expected[name].detach().numpy(), rtol=1e-5, atol=1e-6
        )
