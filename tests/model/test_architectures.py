"""Shapes from config.json: against published sizes, and against models that are really built."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import ModelError
from grandrounds.model.architectures import (
    FAMILIES,
    adapter_shapes,
    find_architecture,
    from_config,
    known_names,
    target_modules,
)
from tests.places import ROOT

PUBLISHED_PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "internlm/internlm3-8b-instruct": 8_804_241_408,
    "microsoft/phi-4": 14_659_507_200,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-2b": 2_614_341_888,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "deepseek-ai/deepseek-coder-1.3b-base": 1_346_471_936,
    "deepseek-ai/deepseek-coder-6.7b-base": 6_740_512_768,
    "deepseek-ai/deepseek-coder-7b-base-v1.5": 6_910_365_696,
}
"""Numbers in the safetensors files on the hub, a tied head counted once."""


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_a_known_base_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    assert find_architecture(name).parameters == parameters


def test_every_known_base_is_checked_against_its_published_size() -> None:
    checked = {find_architecture(name).known_as for name in PUBLISHED_PARAMETERS}
    assert {find_architecture(name).known_as for name in known_names()} == checked


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        # 48 layers of 16 ((4096 + 4096) * 2 + (4096 + 256) * 2)
        ("internlm/internlm3-8b-instruct", "q_proj,k_proj,v_proj,o_proj", 48 * 16 * 25_088),
        # 40 layers of 16 (5120 + 7680 + 5120 + 35840): qkv is 5120 + 2 * 1280 wide
        ("microsoft/phi-4", "qkv_proj,gate_up_proj", 40 * 16 * 53_760),
        # 42 layers of 16 (3584 + 16 * 256 + 3584 + 8 * 256): heads wider than hidden / heads
        ("google/gemma-2-9b", "q_proj,v_proj", 42 * 16 * 13_312),
    ],
)
def test_adapters_have_the_parameters_worked_out_by_hand(
    name: str, modules: str, parameters: int
) -> None:
    base = find_architecture(name)
    shapes = adapter_shapes(base, target_modules(base, modules), 16)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_dora_adds_a_magnitude_for_each_output() -> None:
    base = find_architecture("Qwen/Qwen3-0.6B")
    shapes = adapter_shapes(base, ["k_proj"], 8, dora=True)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector"
    assert shapes[name] == (8 * 128,)
    assert len(shapes) == 3 * 28


# --- Against transformers and PEFT ----------------------------------------------------------------


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of a family, with heads that are not hidden / heads wide."""
    from transformers import CONFIG_MAPPING

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type in ("qwen3", "gemma2", "internlm3"):
        sizes["head_dim"] = 24
    return CONFIG_MAPPING[model_type](**{**sizes, **changes})


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_the_model_that_transformers_builds(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    from grandrounds.model.lora import LoraSpec, adapter_layout, base_parameters

    tiny_config(model_type, tie_word_embeddings=tied).save_pretrained(tmp_path)
    base = find_architecture(str(tmp_path))
    built, targets = adapter_layout(str(tmp_path), LoraSpec(4, 8, "all-linear", 0.0))
    assert target_modules(base, "all-linear") == list(targets.modules)
    assert list(adapter_shapes(base, targets.modules, 4).items()) == list(built.items())
    assert base.parameters == base_parameters(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "biases"),
    [
        ("llama", ["attention_bias"]),
        ("llama", ["mlp_bias"]),
        ("qwen3", ["attention_bias"]),
        ("gemma2", ["attention_bias"]),
        ("internlm3", ["qkv_bias", "bias"]),
    ],
)
def test_biases_are_counted(model_type: str, biases: list[str], tmp_path: Path) -> None:
    from grandrounds.model.lora import base_parameters

    tiny_config(model_type, **dict.fromkeys(biases, True)).save_pretrained(tmp_path)
    assert find_architecture(str(tmp_path)).parameters == base_parameters(str(tmp_path))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_assumes(
    model_type: str, tmp_path: Path
) -> None:
    from transformers import CONFIG_MAPPING

    sizes = {"hidden_size": 64, "num_attention_heads": 32, "intermediate_size": 96}
    given = {"model_type": model_type, "num_hidden_layers": 1, "vocab_size": 40, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(given))
    base = find_architecture(str(tmp_path))
    full = CONFIG_MAPPING[model_type](**given).to_dict()
    assert base == from_config(base.name, full, base.known_as)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_is_what_peft_chooses(model_type: str) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE

    chosen = FAMILIES[model_type].auto
    assert (None if chosen is None else list(chosen)) == CHOICE.get(model_type)


def test_the_embedded_base_is_read_from_its_folder_and_adapted_on_all_linear_modules() -> None:
    from grandrounds.model.lora import LoraSpec, adapter_layout, base_parameters

    base = find_architecture("formulary")
    built, targets = adapter_layout("formulary", LoraSpec(16, 32, "auto", 0.0))
    assert target_modules(base, "auto") == list(targets.modules)
    assert dict(adapter_shapes(base, targets.modules, 16)) == built
    assert base.parameters == base_parameters("formulary")


# --- Names and errors -----------------------------------------------------------------------------


def test_names_are_looked_up_whatever_their_case() -> None:
    base = find_architecture("JohnSnowLabs/jsl-medllama-3-8b-v1.0")
    assert base.known_as == "meta-llama/Meta-Llama-3-8B"


def test_every_base_of_a_recipe_is_known() -> None:
    from grandrounds.config import recipes

    for file in (ROOT / "configs").glob("*.toml"):
        assert find_architecture(str(recipes.load_recipe(file)["model.name"]))


def test_an_unknown_name_is_told_what_to_give() -> None:
    with pytest.raises(ModelError) as told:
        find_architecture("Qwen/Qwen2.5-7B-Instrukt")
    said = str(told.value)
    assert "Did you mean 'Qwen/Qwen2.5-7B-Instruct'?" in said
    assert "local folder with its config.json" in said
    assert "--architecture" in said
    assert "microsoft/phi-4" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "mamba"}', "'mamba' is unsupported; the shapes are known for llama,"),
        ('{"model_type": "llama"}', "hidden_size = None must be an integer of at least 1"),
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_config_json_that_cannot_be_used_is_told_plainly(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        find_architecture(str(tmp_path))


def test_a_folder_without_config_json_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read: No such file"):
        find_architecture(str(tmp_path))


def test_auto_without_a_choice_and_unknown_modules_are_refused_as_in_a_run() -> None:
    base = find_architecture("microsoft/phi-4")
    with pytest.raises(ModelError, match=r"PEFT has no default for 'phi3'\. Name some"):
        target_modules(base, "auto")
    with pytest.raises(ModelError, match=r"matches no linear module .* Did you mean 'qkv_proj'"):
        target_modules(base, "q_proj")
    with pytest.raises(ModelError, match="names no module"):
        target_modules(base, " , ")


def test_a_target_that_an_adapter_cannot_use_is_refused_also_in_an_entrys_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It matches a module, so it is not passed over as one that matches nothing."""
    from grandrounds.model import targets
    from grandrounds.model.lora import without_weights

    tiny_config("llama").save_pretrained(tmp_path)
    monkeypatch.setitem(targets.UNREAD, "llama", ("o_proj",))
    model = without_weights(str(tmp_path))
    assert targets.find_targets(model, "q_proj?,W_pack?", "x").modules == ("q_proj",)
    for wanted in ("q_proj,o_proj", "q_proj?,o_proj?"):
        with pytest.raises(ModelError, match="'o_proj', which an adapter on 'x' cannot use"):
            targets.find_targets(model, wanted, "x")
