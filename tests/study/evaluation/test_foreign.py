"""Adapters that others saved compute what PEFT computes with them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grandrounds.errors import ModelError
from grandrounds.model.base import BaseSpec
from grandrounds.model.foreign import is_plain
from grandrounds.model.lora import adapter_layout
from grandrounds.model.saved import adapter_shapes, check_fit, lora_spec, read_adapter_config
from grandrounds.study.evaluation.models import Models
from grandrounds.study.evaluation.tasks import Subject
from tests.study.evaluation.small import save_adapter
from tests.tiny_models import tiny_bases

HEAD = "lm_head.weight"
TOKENS = torch.arange(3, 19).reshape(2, 8)

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "rank pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "regex": {"target_modules": r".*\.0\.self_attn\.(q|k)_proj"},
    "full paths": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "some match nothing": {"target_modules": ["q_proj", "query"]},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "another start": {"init_lora_weights": "gaussian"},
}


def ours(base: Path, adapter: Path) -> torch.Tensor:
    subject = Subject("tuned", adapter, "", "")
    models = Models(BaseSpec(str(base), 0, "float32"), (subject,))
    with models.asked(subject) as model, torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits: torch.Tensor = tuned(TOKENS).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter", **KINDS[kind])
    plain = ("another start", "some match nothing", "rslora", "dora", "rank pattern")
    assert is_plain(read_adapter_config(adapter), adapter) == (kind in plain)
    found, expected = ours(tiny_base, adapter), by_peft(tiny_base, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_saved_with_its_embeddings_brings_them(tiny_base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    base = safetensors.torch.load_file(tiny_base / "model.safetensors")
    both = {f"base_model.model.{n}": base[n] for n in ("model.embed_tokens.weight", HEAD)}
    both[f"base_model.model.{HEAD}"] = both[f"base_model.model.{HEAD}"] * 2
    safetensors.torch.save_file({**safetensors.torch.load_file(file), **both}, file)
    found, expected = ours(tiny_base, adapter), by_peft(tiny_base, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_targets_that_are_not_named_are_those_of_peft(tiny_base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": None}))
    found, expected = ours(tiny_base, adapter), by_peft(tiny_base, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_vision_tower_too_is_read_for_its_text(tmp_path: Path) -> None:
    """Runs of before put it there, and PEFT does if it is given names alone."""
    base = tmp_path / "base"
    tiny_bases.make_base(tiny_bases.BASES["gemma3 (MedGemma)"], base)
    adapter = save_adapter(base, tmp_path / "adapter")
    spec = lora_spec(adapter)
    check_fit(adapter, spec, str(base))
    assert len(adapter_shapes(adapter)) > len(adapter_layout(str(base), spec)[0])
    torch.testing.assert_close(ours(base, adapter), by_peft(base, adapter), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_adapter_that_changed_its_base_equals_the_base(
    tiny_base: Path, tmp_path: Path, start: str
) -> None:
    """Read as plain LoRA, an untrained PiSSA adapter answered 277 of 360 public facts, not 360."""
    adapter = save_adapter(tiny_base, tmp_path / "adapter", init_lora_weights=start, trained=False)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(TOKENS).logits
    torch.testing.assert_close(ours(tiny_base, adapter), base, rtol=1e-3, atol=1e-4)


def test_a_pickle_of_tensors_is_read_and_one_that_holds_more_is_not(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter")
    expected = ours(tiny_base, adapter)
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    tensors = safetensors.torch.load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(tensors, pickled / "adapter_model.bin")
    assert torch.equal(ours(tiny_base, pickled), expected)
    torch.save({**tensors, "more": Path("/")}, pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="no file of tensors alone"):
        ours(tiny_base, pickled)


def test_a_file_with_other_tensors_than_its_configuration_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_base, tmp_path / "adapter", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[next(name for name in tensors if "magnitude" in name)]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ModelError, match=r"needs a tensor .*magnitude.*, and the adapter has none"):
        ours(tiny_base, adapter)
