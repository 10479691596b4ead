"""Ranks and alphas of single modules: what PEFT computes with its `rank_pattern`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from grandrounds.config.recipes import resolve
from grandrounds.errors import ModelError
from grandrounds.model.architectures import adapter_shapes, find_architecture, target_modules
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec, adapter_layout, adapter_parameters, module_of
from grandrounds.model.loss import Forward
from grandrounds.model.memory import precision_of, site_memory
from grandrounds.model.patterns import check_patterns, number_at
from grandrounds.model.resident import resident_model, set_adapter
from grandrounds.study.export import merge
from tests.model.test_loss import loss_and_gradients, one_by_one
from tests.tiny_models import saved_config, tiny_bases

RANKS = (("layers.0.self_attn.q_proj", 3), (r"model\.layers\.[1-9]\.self_attn\.v_proj", 7))
ALPHAS = (("v_proj", 5.0), (".*0.*down_proj", 1.5))
OF_GPT2 = ((("h.0.attn.c_attn", 3), ("mlp.c_proj", 6)), (("c_fc", 5.0),))

FAMILIES = {"llama": (RANKS, ALPHAS), "qwen3": (RANKS, ALPHAS), "gpt2": OF_GPT2}


VARIANTS = {"lora": {}, "rslora and dora": {"use_rslora": True, "use_dora": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_merged_weights_are_those_of_peft(
    family: str, variant: str, tmp_path: Path
) -> None:
    """Ours in one batch by a visit's own loss, PEFT's one by one on the model's logits."""
    (ranks, alphas), options = FAMILIES[family], VARIANTS[variant]
    tiny_bases.make_base(tiny_bases.BASES[family], tmp_path)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        LoraConfig(
            r=4,
            lora_alpha=8,
            rank_pattern=dict(ranks),
            alpha_pattern=dict(alphas),
            target_modules="all-linear",
            fan_in_fan_out=family == "gpt2",
            task_type="CAUSAL_LM",
            **options,
        ),
    )
    generator = torch.Generator().manual_seed(5)
    named = adapter_parameters(theirs)
    with torch.no_grad():
        for parameter in named.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
    spec = LoraSpec(
        *(4, 8.0, "all-linear", 0.0, "use_rslora" in options, ranks, alphas, "use_dora" in options)
    )
    assert {name: t.shape for name, t in adapter.items()} == adapter_layout(str(tmp_path), spec)[0]
    assert len({spec.scale_of(module_of(name)) for name in adapter}) > 2
    resident = resident_model(BaseSpec(str(tmp_path), 0, "float32"), spec)
    set_adapter(resident, adapter)
    known = family != "gpt2"
    forward = Forward(False, known, known, 7 * known)
    loss, gradients = loss_and_gradients(resident.model.eval(), forward)
    expected, their_gradients = one_by_one(theirs.eval())
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, ours, peft in zip(named, gradients, their_gradients, strict=True):
        assert float((ours - peft).abs().max()) <= 1e-5 * float(peft.abs().max()), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    merge(merged, adapter, {n: spec.scale_of(module_of(n)) for n in adapter}, torch.float32)
    by_peft = dict(theirs.merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, by_peft[name], rtol=1e-5, atol=1e-6)


def test_the_first_expression_that_matches_the_end_of_a_path_holds() -> None:
    table = (("layers.0.q_proj", 2), ("q_proj", 3), ("[kv]_proj", 5))
    paths = ("model.layers.0.q_proj", "model.layers.1.q_proj", "a.v_proj", "a.xv_proj", "v_proj")
    assert [number_at(table, path, 8) for path in paths] == [2, 3, 5, 8, 5]
    assert number_at((), "q_proj", 8) == 8


def test_an_expression_that_matches_nothing_is_refused_with_what_there_is(tiny_base: Path) -> None:
    def spec(*table: tuple[str, int]) -> LoraSpec:
        return LoraSpec(4, 8.0, "q_proj,v_proj", 0.0, rank_pattern=table)

    with pytest.raises(ModelError, match=r"model\.lora\.rank-pattern names 'k_proj', which") as e:
        adapter_layout(str(tiny_base), spec(("q_proj", 2), ("k_proj", 2)))
    assert "They are q_proj, v_proj, with paths such as model.layers.0.self_attn.q_proj" in str(
        e.value
    )
    with pytest.raises(ModelError, match=r"alpha-pattern names 'q_porj', .* Did you mean 'q_proj'"):
        check_patterns({"model.lora.alpha-pattern": (("q_porj", 1.0),)}, ["a.q_proj"], "base")
    with pytest.raises(ModelError, match=r"both 'v_proj' and '\.\*_proj' match .*v_proj of"):
        adapter_layout(str(tiny_base), spec(("v_proj", 2), (".*_proj", 4)))
    adapter_layout(str(tiny_base), spec(("v_proj", 4), (".*_proj", 4)))  # in either order the same


def test_shapes_and_memory_are_planned_from_the_architecture(tmp_path: Path) -> None:
    """Of q_proj (32 x 32) at rank 64 in one layer of two, and 4 elsewhere."""
    name = saved_config("llama", tmp_path)
    base = find_architecture(name)
    table = (("0.self_attn.q_proj", 64),)
    targets = target_modules(base, "q_proj,v_proj")
    spec = LoraSpec(4, 8.0, "q_proj,v_proj", 0.0, rank_pattern=table)
    planned = adapter_shapes(base, targets, 4, rank_pattern=table)
    assert list(planned.items()) == list(adapter_layout(name, spec)[0].items())
    plain = resolve({"model.name": name, "model.lora.peft-lora-r": 4, "strategy.name": "fedavg"})
    config = resolve(plain.flat(), {"model.lora.rank-pattern": json.dumps(dict(table))})
    small, large = (
        site_memory(c, base, targets, precision_of(c), checkpointing=False) for c in (plain, config)
    )
    module = next(m for m in base.linears if m.name == "q_proj")
    assert large.adapter - small.adapter == 2 * 4 * 60 * (module.inputs + module.outputs)
    assert large.activations > small.activations
