"""An adapter is put where the text passes and PEFT computes the right thing; the rest is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grandrounds.config.recipes import resolve
from grandrounds.errors import ModelError
from grandrounds.model import headroom
from grandrounds.model.lora import LoraSpec, adapter_layout, add_lora, peft_config
from grandrounds.model.targets import keeps_to_the_text
from tests.tiny_models import saved_config

EVERY = LoraSpec(4, 8.0, "all-linear", 0.0)
EXPERTS = ("experts.down_proj", "experts.gate_up_proj")
MLP = ("down_proj", "gate_proj", "up_proj")


def of(name: str, folder: Path, targets: str = "all-linear") -> tuple[dict, object]:
    shapes, found = adapter_layout(saved_config(name, folder), LoraSpec(4, 8.0, targets, 0.0))
    return dict(shapes), found


@pytest.mark.parametrize("name", ["gemma3 (MedGemma)", "gemma4"])
def test_a_composite_is_adapted_in_its_text_model_alone(name: str, tmp_path: Path) -> None:
    """35 % of MedGemma's adapter was on its vision tower, and never trained."""
    for wanted in ("all-linear", "auto", "q_proj,v_proj"):
        shapes, targets = of(name, tmp_path, wanted)
        assert {"q_proj", "v_proj"} <= set(targets.modules)
        assert all(key.startswith("base_model.model.model.language_model.") for key in shapes)
    spec = LoraSpec(4, 8.0, "q_proj,v_proj", 0.0)
    if targets.excluded is not None:  # what is saved tells plain PEFT the same
        assert keeps_to_the_text(targets.excluded)
        from peft import get_peft_model

        with torch.device("meta"):
            from transformers import AutoConfig

            plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
            adapted = get_peft_model(plain, peft_config(spec, targets))
        names = {n.replace(".default", "") for n, p in adapted.named_parameters() if "lora_" in n}
        assert names == set(shapes)


def test_a_text_model_has_nothing_to_leave_out(tiny_base: Path) -> None:
    _, targets = adapter_layout(str(tiny_base), EVERY)
    assert targets.excluded is None
    assert targets.frozen == ()
    assert not targets.transposed


def test_conv1d_is_adapted_as_peft_does(tmp_path: Path) -> None:
    """GPT-2's c_attn makes 3 x 32 outputs of 32 inputs, and stores (32, 96)."""
    shapes, targets = of("gpt2", tmp_path, "auto")
    assert targets.modules == ("c_attn",)
    assert peft_config(EVERY, targets).fan_in_fan_out
    stem = "base_model.model.transformer.h.0.attn.c_attn.lora"
    assert shapes[f"{stem}_A.weight"] == (4, 32)
    assert shapes[f"{stem}_B.weight"] == (96, 4)


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        *((name, MLP + EXPERTS) for name in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")),
        *((name, MLP + EXPERTS) for name in ("ernie4_5_moe", "qwen3_next", "hunyuan_v1_moe")),
        *((name, EXPERTS) for name in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss")),
        *((name, ("router", *EXPERTS)) for name in ("phimoe", "llama4_text")),
        ("mamba", ("dt_proj", "out_proj", "x_proj")),
        ("falcon_h1", ("out_proj",)),
        ("jamba", ("dt_proj", *EXPERTS)),
    ],
)
def test_what_all_linear_leaves_out_is_named_and_every_tensor_has_the_rank(
    name: str, frozen: tuple[str, ...], tmp_path: Path
) -> None:
    """Half of these failed with a shape error or PEFT's own in the middle of a run; the others left
    experts out without a word, and Jamba's dt_proj had no gradient."""
    shapes, targets = of(name, tmp_path)
    assert targets.frozen == frozen
    assert {shape[0] for key, shape in shapes.items() if ".lora_A." in key} == {4}
    assert {shape[1] for key, shape in shapes.items() if ".lora_B." in key} == {4}
    assert not {key.split(".")[-3] for key in shapes} & {n for n in frozen if "." not in n}


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("llama4_text", "router", "more than a product"),
        ("mamba", "out_proj", "past an adapter"),
        ("deepseek_v3", "gate_proj", "fused experts"),
        ("mixtral", "w1", "matches no linear module"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_refused_by_its_reason(
    name: str, target: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        of(name, tmp_path, f"q_proj,{target}" if name != "mamba" else target)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_rank_is_refused_at_once(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever PEFT does to a target, no run finds it out in its middle."""
    import peft

    plain = peft.get_peft_model

    def doubling(model: object, config: object) -> object:
        config.r *= 2  # type: ignore[attr-defined]
        return plain(model, config)

    monkeypatch.setattr(peft, "get_peft_model", doubling)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(ModelError, match=r"of shape \(8, 32\), and the rank is 4"):
        add_lora(base, LoraSpec(4, 8.0, "q_proj", 0.0), str(tiny_base))


def test_checkpointing_is_left_out_where_transformers_has_none(tmp_path: Path) -> None:
    """Every visit on a JetMoE failed with PyTorch's own error."""
    name = saved_config("jetmoe", tmp_path)
    assert not headroom.checkpoints_activations(resolve({"model.name": name}))
    with pytest.raises(ModelError, match="does not support it"):
        headroom.checkpoints_activations(
            resolve({"model.name": name, "model.gradient-checkpointing": True})
        )
