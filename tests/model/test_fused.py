"""Fused kernels: what stands in where, the proof, and what is left as it was.

Liger's kernels run on a GPU only; here PyTorch's operations take their place (`tests/liger.py`).
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grandrounds.config import recipes
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import fused, headroom, layer_proof, machine
from grandrounds.model.fused import LORA, MLP, NORM, PIECES, ROPE
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.resident import keep_weights
from grandrounds.site.training import VisitSettings, train_visit
from grandrounds.wire.schedule import VisitSchedule
from tests import liger
from tests.model.test_lora_linear import adapted, error, llama, results
from tests.tiny_models import tiny_bases

BATCH = [TokenizedExample(tuple(range(3, 3 + n)), 2) for n in (9, 14, 5)]
FUSED = Forward(False, padding_free=True, answers_only=True, chunk_tokens=64, fused=True)


@pytest.fixture(autouse=True)
def _nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_refused", set())


@pytest.fixture
def _liger(monkeypatch: pytest.MonkeyPatch) -> None:
    liger.installed(monkeypatch)


def of_family(name: str) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_bases.config_of(tiny_bases.BASES[name]))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:  # norms that start at 1 would hide an offset
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return adapted(base, target_modules="all-linear")


def forwards(model: Any) -> list[Any]:
    """Return what computes each module, and transformers' RoPE."""
    decoder = model.get_base_model().get_decoder()
    rotate = sys.modules[type(decoder).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    return [*(module.__dict__.get("forward") for module in model.modules()), rotate]


@pytest.mark.usefixtures("_liger")
@pytest.mark.parametrize("name", fused.FAMILIES)
def test_every_family_is_proved_computes_the_same_and_is_left_as_it_was(name: str) -> None:
    model = of_family(name)
    before, plain = forwards(model), results(model, autocast=False)
    with fused.fused(model, bf16=False):
        assert forwards(model) != before
        ours = results(model, autocast=False)
    assert forwards(model) == before
    found = fused.of_model(model)
    assert found is not None
    assert found.proved == PIECES
    assert error(ours[0], plain[0]) < 2e-5
    assert max(error(a, b) for a, b in zip(ours[1], plain[1], strict=True)) < 5e-5
    layers = len(model.get_base_model().get_decoder().layers)
    assert len(found.patches[MLP]) == layers
    assert liger.LigerRMSNormFunction.calls > 2 * layers
    assert liger.LigerRopeFunction.calls >= layers


def test_a_family_without_a_row_and_a_machine_without_liger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "has_liger", lambda: False)
    model = llama_with_adapter()
    assert set(fused.prepared(model).patches) == {LORA}
    other = adapted(
        AutoModelForCausalLM.from_config(tiny_bases.config_of(tiny_bases.BASES["cohere"]))
    )
    before = forwards(other)
    with fused.fused(other, bf16=False):
        assert forwards(other) == before


@pytest.mark.usefixtures("_liger")
def test_in_bfloat16_more_draws_refuse_what_rounds_worse_and_no_other_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LoRA's function is refused by one draw of Qwen 3, where it is as exact on average. OLMo 2's
    norm rounds after its weight, and here once more by one unit in the last place."""

    def autocast(device: torch.device, bf16: bool) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    monkeypatch.setattr(layer_proof, "mixed_precision", autocast)

    def proved(name: str) -> tuple[str, ...]:
        model = of_family(name)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        found = fused.prepared(model)
        fused.prove(found, model, bf16=True)
        return found.proved

    assert proved("qwen3") == proved("olmo2") == PIECES
    own = liger.LigerRMSNormFunction.compute

    def worse(x: torch.Tensor, *how: Any) -> torch.Tensor:
        y = own(x, *how)
        return y + y * torch.sign(torch.sin(1e4 * x.detach().float())).to(y.dtype) / 128

    monkeypatch.setattr(liger.LigerRMSNormFunction, "compute", worse)
    with pytest.warns(RuntimeWarning, match="fused norm is not used: the error of"):
        assert proved("olmo2") == (LORA, MLP, ROPE)


def test_errors_exceed_what_is_allowed_only_beyond_two_standard_errors() -> None:
    """Ratios 1.05 x e and e^-1 x 1.05: mean logarithm 0, and none with doubt of 2 / sqrt(2) x 2."""
    own = [{"output": 1.0}, {"output": 1.0}]
    worse = [{"output": 1.05 * math.e}, {"output": 1.05 / math.e}]
    assert layer_proof.excess_of(worse[:1], own[:1])["output"] == pytest.approx(1, abs=1e-4)
    assert layer_proof.excess_of(worse, own)["output"] == pytest.approx(-2, abs=1e-4)
    assert layer_proof.excess_of([worse[0]] * 2, own)["output"] == pytest.approx(1, abs=1e-4)
    assert layer_proof.mean(worse)["output"] == pytest.approx(1.05)


def llama_with_adapter() -> Any:
    return adapted(llama())


@pytest.mark.usefixtures("_liger")
def test_a_piece_that_is_less_exact_is_not_used_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounded(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(gate) * up).bfloat16().to(up.dtype)

    monkeypatch.setattr(liger.LigerSiLUMulFunction, "compute", rounded)
    model = llama_with_adapter()
    with (
        pytest.warns(
            RuntimeWarning, match=r"fused MLP is not used: the error of .* against float32"
        ),
        fused.fused(model, bf16=False),
    ):
        pass
    found = fused.of_model(model)
    assert found is not None
    assert found.proved == (LORA, NORM, ROPE)
    assert found.errors[MLP]["the output"] > 100 * found.errors["none"]["the output"]


@pytest.mark.usefixtures("_liger")
def test_a_kernel_that_fails_is_not_used_and_not_promised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*arguments: Any) -> Any:
        raise OSError("no C compiler")

    monkeypatch.setattr(liger.LigerRMSNormFunction, "compute", failing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fused.pieces_of("llama") == PIECES
    with pytest.warns(
        RuntimeWarning, match=r"norm is not used: it fails here \(OSError: no C comp"
    ):
        fused.prove(found := fused.prepared(model := llama_with_adapter()), model, bf16=False)
    assert found.proved == (LORA, MLP, ROPE)
    assert fused.pieces_of("llama") == (LORA, MLP, ROPE)


@pytest.mark.usefixtures("_liger")
@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_a_proof_needs_no_gradient_of_the_other_factor(trained: str) -> None:
    """`ffa` trains B alone; where A alone is trained, B is 0 at first."""
    model = llama_with_adapter()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trained in name)
            parameter.data.zero_()
    found = fused.prepared(model)
    fused.prove(found, model, bf16=False)
    assert found.proved == PIECES
    assert all(not p.any() for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.usefixtures("_liger")
def test_layers_that_cannot_be_proved_compute_as_before_and_a_lack_of_memory_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama_with_adapter()

    def raising(error: Exception) -> Any:
        def copy(decoder: Any) -> Any:
            raise error

        return copy

    monkeypatch.setattr(layer_proof, "_in_float32", raising(TypeError("cannot be copied")))
    found = fused.prepared(model)
    with pytest.warns(
        RuntimeWarning, match=r"no proof is possible \(TypeError: cannot be copied\)"
    ):
        fused.prove(found, model, bf16=False)
    assert found.proved == ()
    monkeypatch.setattr(
        layer_proof, "_in_float32", raising(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        fused.prove(found, model, bf16=False)


@pytest.mark.usefixtures("_liger")
def test_the_proof_leaves_adapter_mode_and_random_numbers_as_they_were() -> None:
    model = llama_with_adapter()
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fused.prove(fused.prepared(model), model, bf16=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert len(model.get_base_model().model.layers) == 2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("_liger")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_without_padding_and_its_gradient_are_the_same(checkpointing: bool) -> None:
    model = llama_with_adapter()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    found = []
    for how in (FUSED, Forward(False, True, True, 64)):
        with attending(model, how):
            loss = answer_nll_sum(model, BATCH, 0, torch.device("cpu"), how)
            loss.backward()
        factors = [p for p in model.parameters() if p.requires_grad]
        found.append((float(loss.detach()), torch.cat([p.grad.flatten() for p in factors])))  # type: ignore[union-attr]
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert error(found[0][1], found[1][1]) < 1e-4


def test_on_a_cpu_nothing_is_fused(tiny_base: Path) -> None:
    config = recipes.resolve({"model.name": str(tiny_base)})
    assert not machine.forward(config).fused
    assert "fused" not in machine.means(config)
    assert not headroom.device_precision(config).fused


@pytest.mark.usefixtures("_liger")
def test_where_they_are_used_the_roll_call_says_so(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "pieces_of", lambda model_type: PIECES)
    settings = {"model.name": str(tiny_base)}
    config = recipes.resolve(settings)
    assert machine.forward(config).fused
    assert machine.means(config).endswith("fused LoRA, norm, MLP, RoPE")
    assert headroom.device_precision(config).fused == set(PIECES)
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 1.0,
        "privacy.declared-units": 400,
    }
    for off in (
        {"train.fused-kernels": "off"},
        {"train.training-arguments.torch-compile": True},
        {"model.quantization": 8},
        private,
    ):
        config = recipes.resolve({**settings, **off})
        assert not machine.forward(config).fused
        assert "fused" not in machine.means(config)


def test_weights_of_the_first_layers_are_kept_until_they_are_let_go() -> None:
    model = llama_with_adapter()
    fused.keep_weights(model, 0, bf16=False)
    assert fused.of_model(model) is None  # nothing to let go of, and nothing proved for it
    fused.keep_weights(model, 1, bf16=False)
    found = fused.of_model(model)
    assert found is not None
    kept: list[bool] = []
    for layer in found.weights:
        for frozen in layer:
            frozen.keep = lambda wanted: kept.append(wanted)  # type: ignore[method-assign]
    fused.keep_weights(model, 1, bf16=False)
    assert kept == [True] * 3 + [False] * 3
    found.proved = ()
    kept.clear()
    fused.keep_weights(model, 2, bf16=False)
    assert kept == [False] * 6


@pytest.mark.usefixtures("_liger")
def test_a_visit_on_four_bits_keeps_its_weights_and_trains_the_same_adapter(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: decided by memory, proved, kept, trained, and let go for a private visit."""
    pytest.importorskip("bitsandbytes")
    for name in ("_settled", "_kept"):
        monkeypatch.setattr(headroom, name, {})
    settings = {"model.name": str(tiny_base), "model.quantization": 4, "model.dtype": "float32"}
    adapters = {}
    for how in ("off", "auto"):
        pieces = PIECES if how == "auto" else ()
        monkeypatch.setattr(headroom, "fused_pieces", lambda config, pieces=pieces: pieces)
        config = recipes.resolve({**settings, "train.fused-kernels": how})
        resident = machine.prepare_model(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in resident.parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        forward = machine.forward(config)
        assert forward.fused is (how == "auto")
        ways = VisitSettings(
            1, VisitSchedule(1e-3, 0), "adamw_torch", 0.0, 1.0, 0.0, forward=forward, seed=1
        )
        parameters = list(resident.parameters.values())

        def visit(resident: Any = resident, ways: Any = ways, parameters: Any = parameters) -> None:
            train_visit(resident.model, parameters, [BATCH] * 3, ways, 0)

        headroom.run_visit(config, resident, visit)
        assert resident.kept_layers == (2 if how == "auto" else 0)
        adapters[how] = torch.cat([p.detach().flatten().clone() for p in parameters])
    found = fused.of_model(resident.model)
    assert found is not None
    assert found.proved == PIECES
    assert all(frozen.weight is frozen.weight for layer in found.weights for frozen in layer)
    assert 0 < error(adapters["auto"], adapters["off"]) < 1e-3
    keep_weights(resident, 0, bf16=False)
    assert all(frozen.weight is not frozen.weight for layer in found.weights for frozen in layer)


def test_a_model_without_an_adapter_is_left_alone() -> None:
    base = llama()
    with warnings.catch_warnings(), attending(base, FUSED):
        warnings.simplefilter("error")
        answer_nll_sum(base, BATCH, 0, torch.device("cpu"), FUSED)
    assert fused.of_model(base) is None
