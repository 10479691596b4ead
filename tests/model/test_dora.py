"""DoRA: where its magnitudes start; loss, gradients and merged weights against PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from grandrounds.errors import ModelError
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec, adapter_layout
from grandrounds.model.loss import Forward
from grandrounds.model.magnitudes import row_norms
from grandrounds.model.resident import checkpoint_activations, resident_model, set_adapter
from grandrounds.study.export import merge
from grandrounds.wire.adapter import Adapter, is_magnitude, started_adapter
from tests.model.test_loss import loss_and_gradients, one_by_one
from tests.tiny_models import tiny_bases

SPEC = LoraSpec(4, 8.0, "all-linear", 0.0, dora=True)

FAMILIES = ("llama", "qwen3", "gpt2")
"""The last one stores its weights transposed, and has no family of its own in the loss."""


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_bases.make_base(tiny_bases.BASES[request.param], folder)
    return folder


def trained(base: Path) -> Adapter:
    """Return an adapter that has moved from its start in all of its tensors."""
    resident = resident_model(BaseSpec(str(base), 0, "float32"), SPEC)
    shapes, _ = adapter_layout(str(base), SPEC)
    start = started_adapter(shapes, 1, resident.magnitudes)
    assert list(start) == list(shapes) == list(resident.parameters)
    rng = np.random.default_rng(2)
    return {n: (t + 0.1 * rng.standard_normal(t.shape)).astype("f4") for n, t in start.items()}


def by_peft(base: Path, adapter: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """Return PEFT's own DoRA with these tensors, and its parameters by the names it saves."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    _, targets = adapter_layout(str(base), SPEC)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=list(targets.modules),
        fan_in_fan_out=targets.transposed,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    named = {
        n.replace("vector.default.weight", "vector").replace(".default.", "."): p
        for n, p in peft.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, tensor in adapter.items():
            named[name].copy_(torch.tensor(tensor))
    return peft, named


@pytest.mark.parametrize("how", ["padding-free", "padded", "checkpointed"])
def test_loss_and_gradients_are_those_of_peft(base: Path, how: str) -> None:
    """Relative to the largest gradient of the tensor; ours in one batch, PEFT's one by one."""
    known = not base.name.startswith("gpt2")
    if not known and how == "padding-free":
        pytest.skip("no padding-free batches for this family")
    adapter = trained(base)
    resident = resident_model(BaseSpec(str(base), 0, "float32"), SPEC)
    set_adapter(resident, adapter)
    checkpoint_activations(resident, how == "checkpointed")
    resident.model.train(how == "checkpointed")
    loss, gradients = loss_and_gradients(
        resident.model, Forward(False, how == "padding-free", known, 7 * known)
    )
    checkpoint_activations(resident, False)
    theirs, named = by_peft(base, adapter)
    expected, their_gradients = one_by_one(theirs.eval())
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, ours, peft in zip(named, gradients, their_gradients, strict=True):
        assert float((ours - peft).abs().max()) <= 1e-5 * float(peft.abs().max()), name


def test_merged_weights_are_those_of_peft(base: Path) -> None:
    adapter = trained(base)
    merged = AutoModelForCausalLM.from_pretrained(base)
    merge(merged, adapter, dict.fromkeys(adapter, SPEC.scale_of("")), torch.float32)
    expected = dict(by_peft(base, adapter)[0].merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_magnitudes_start_where_those_of_peft_do(base: Path) -> None:
    resident = resident_model(BaseSpec(str(base), 0, "float32"), SPEC)
    _, fresh = by_peft(base, {})
    assert list(resident.magnitudes) == list(filter(is_magnitude, fresh))
    for name, norms in resident.magnitudes.items():
        np.testing.assert_allclose(norms, fresh[name].detach().numpy(), rtol=1e-6)


def test_a_norm_does_not_depend_on_the_order_of_the_sum_or_on_the_type() -> None:
    weight = torch.randn(50, 3000, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.02
    norms = row_norms(weight)
    np.testing.assert_array_equal(norms, row_norms(weight.float()[:, torch.randperm(3000)]))
    np.testing.assert_allclose(norms, weight.double().norm(dim=1).numpy(), rtol=1e-7)
    np.testing.assert_array_equal(row_norms(weight.float() * 2.0**-70), norms * 2.0**-70)


def test_a_row_without_a_norm_is_named(tiny_base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = 0.0
    model.save_pretrained(tmp_path / "base")
    spec = LoraSpec(4, 8.0, "q_proj,v_proj", 0.0, dora=True)
    resident = resident_model(BaseSpec(str(tmp_path / "base"), 0, "float32"), spec)
    with pytest.raises(ModelError, match=r"row 3 of \S*layers.1.self_attn.v_proj is 0"):
        _ = resident.magnitudes
