"""LoRA's linear module as one function, against PEFT's module and float64 differences."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grandrounds.model import fused
from grandrounds.model.base import say_uneven
from grandrounds.model.lora_linear import Adapted, Factors, Frozen, lora_forwards, lora_linear
from tests.tiny_models import tiny_bases

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCALES: dict[str, Any] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3, "down_proj": 7}},
}


def adapted(base: Any, **options: Any) -> Any:
    """Return a base with a random float32 adapter, in training mode."""
    targets = options.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base.requires_grad_(False), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
    return model


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).to(dtype)


def results(model: Any, autocast: bool, rows: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits of random tokens, and the gradients of all factors."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 280, (rows, 20), generator=generator)
    factors = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=ids, use_cache=False).logits.float()
    # Not a loss, whose gradient is all but 0 for random weights.
    upstream = torch.randn(output.shape, generator=generator)
    return output.detach(), list(torch.autograd.grad(output, factors, upstream))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def furthest(model: Any, autocast: bool = False) -> float:
    """Return the largest relative difference that the fused modules make; the adapter is there."""
    plain, fused_ones = results(model, autocast), []
    found = fused.prepared(model)
    assert found.patches[fused.LORA]
    with found.standing_in((fused.LORA,)):
        fused_ones = [*results(model, autocast)]
    gradients = zip(fused_ones[1], plain[1], strict=True)
    return max(error(fused_ones[0], plain[0]), *(error(a, b) for a, b in gradients))


@pytest.mark.parametrize("scale", SCALES)
def test_in_float32_it_is_pefts_module(scale: str) -> None:
    assert furthest(adapted(llama(), **SCALES[scale])) < 1e-5


def in_four_bits(base: Any, dtype: torch.dtype) -> Any:
    """Return a base with the linear modules of its layers quantised to NF4."""
    import bitsandbytes

    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if type(module) is torch.nn.Linear:
                    four = bitsandbytes.nn.Linear4bit(
                        module.in_features, module.out_features, False, dtype, True, "nf4"
                    )
                    four.weight = bitsandbytes.nn.Params4bit(
                        module.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    four.support_avx512bf16_for_cpu = False
                    setattr(parent, name, four.to("cpu"))
    base.is_loaded_in_4bit = True
    return base


def test_modules_whose_inputs_are_no_multiple_of_a_block_are_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        say_uneven(in_four_bits(llama(intermediate_size=128), torch.float32))
        assert not capsys.readouterr().err
        say_uneven(in_four_bits(llama(), torch.float32))
        assert capsys.readouterr().err.startswith("grandrounds: inputs of 96 are no multiple of")
        warnings.warn("inner dimension (96) is not aligned for fast kernel", stacklevel=1)


def test_on_4_bit_weights_it_is_pefts_module() -> None:
    """bitsandbytes dequantises once forward and once backward there too, in float32 on a CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = in_four_bits(llama(), torch.float32)
    model = adapted(base)
    assert len(fused.prepared(model).patches[fused.LORA]) == 14  # those without LoRA too
    assert furthest(model) < 1e-5
    base.model.layers[1].mlp.up_proj.compute_dtype = torch.bfloat16  # not that of its weight
    assert len(fused.prepared(model).patches[fused.LORA]) == 13
    base.model.layers[1].mlp.up_proj.compute_dtype = torch.float32
    layers = fused.prepared(model).weights
    assert [len(weights) for weights in layers] == [7, 7]
    for frozen in layers[0]:
        before = frozen.weight
        assert frozen.weight is not before
        frozen.keep(True)
        assert frozen.weight is frozen.weight
        assert torch.equal(frozen.weight, before)
        exact = bitsandbytes.functional.dequantize_4bit(
            frozen.module.weight.data, frozen.module.weight.quant_state
        )
        assert torch.equal(frozen.weight, exact)
        frozen.keep(False)
        assert frozen.weight is not frozen.weight


def test_under_bfloat16_autocast_its_errors_are_no_larger_than_pefts() -> None:
    """One module, against float64: it rounds less often."""
    module = adapted(llama(torch.bfloat16, hidden_size=256)).base_model.model.model.layers[0]
    layer = module.self_attn.q_proj
    (patched, forward), *_ = lora_forwards(layer)[0]
    assert patched is layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    states, upstream = (torch.randn(400, 256, dtype=torch.bfloat16) for _ in range(2))

    def run(function: Any, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        return [y.detach(), *torch.autograd.grad(y, [x, a, b], upstream.to(y.dtype))]

    weight, scale = layer.base_layer.weight.double(), layer.scaling["default"]
    exact = run(
        lambda x: x @ weight.t() + scale * (x @ a.double().t() @ b.double().t()),
        states.double(),
        autocast=False,
    )
    pefts, ours = run(layer.forward, states, True), run(forward, states, True)
    for truth, theirs, found in zip(exact, pefts, ours, strict=True):
        assert found.dtype == theirs.dtype
        assert error(found, truth) <= 1.02 * error(theirs, truth)


def test_its_gradients_are_those_of_differences_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    module = torch.nn.Linear(5, 7, dtype=torch.float64)
    frozen, x = Frozen(module.requires_grad_(False)), draw(2, 3, 5).requires_grad_()
    a, b = draw(2, 5).requires_grad_(), draw(7, 2).requires_grad_()

    def computed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, Adapted(frozen, a, b, Factors([a, b])), 1.5)

    assert gradcheck(computed, (x, a, b))

    def dropped(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return lora_linear(x, Adapted(frozen, a, b, Factors([a, b])), 1.5, 0.4)

    assert gradcheck(dropped, (x, a, b))
    assert not torch.equal(dropped(x, a, b), computed(x, a, b))


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_is_drawn_in_the_type_and_number_that_peft_draws_it_in(
    four_bits: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's mask depends on both: it draws 16 bytes of values at a time."""
    if four_bits:
        pytest.importorskip("bitsandbytes")
    dtype = torch.bfloat16 if autocast else torch.float32
    base = in_four_bits(llama(dtype), dtype) if four_bits else llama(dtype)
    model = adapted(base, lora_dropout=0.3)
    pefts, ours = list[tuple[torch.dtype, int]](), list[tuple[torch.dtype, int]]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_pre_hook(lambda _, x: pefts.append((x[0].dtype, x[0].numel())))
    own, enabled = torch.native_dropout, torch.is_autocast_enabled
    # Asked without a device, it tells of CUDA's alone, by which PEFT leaves x as it is.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *of: enabled(*(of or ("cpu",))))

    def native_dropout(x: torch.Tensor, p: float, train: bool) -> Any:
        ours.append((x.dtype, x.numel()))
        return own(x, p, train)

    results(model, autocast)
    found = fused.prepared(model)
    assert len(pefts) == 6
    monkeypatch.setattr(torch, "native_dropout", native_dropout)
    with found.standing_in((fused.LORA,)):
        results(model, autocast)
    assert ours == pefts[:6] == pefts  # and none of PEFT's own meanwhile


def test_what_needs_no_gradient_gets_none() -> None:
    """`ffa` trains B alone, and the first layer's input is an embedding."""
    frozen = Frozen(torch.nn.Linear(5, 7).requires_grad_(False))
    x, a, b = torch.randn(4, 5), torch.randn(2, 5), torch.randn(7, 2, requires_grad=True)
    lora_linear(x, Adapted(frozen, a, b, Factors([a, b])), 1.0).sum().backward()
    assert b.grad is not None
    assert a.grad is None
    assert x.grad is None


@contextlib.contextmanager
def counting_casts(monkeypatch: pytest.MonkeyPatch) -> Any:
    calls: list[int] = []
    own = torch._foreach_copy_

    def counted(into: list[torch.Tensor], of: list[torch.Tensor]) -> None:
        calls.append(len(into))
        own(into, of)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    yield calls


def test_factors_are_cast_once_a_pass_and_anew_after_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(llama(torch.bfloat16))
    found = fused.prepared(model)
    outputs = []
    with counting_casts(monkeypatch) as calls:
        for _ in range(2):
            with found.standing_in((fused.LORA,)):
                outputs.append(results(model, autocast=True)[0])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(2)
    assert calls == [12, 12]  # A and B of six modules
    assert not torch.equal(*outputs)


DORA_OR_BIAS: dict[str, Any] = {"DoRA": {"use_dora": True}, "a bias": {"lora_bias": True}}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", DORA_OR_BIAS.values(), ids=DORA_OR_BIAS)
def test_other_kinds_of_adapter_keep_pefts_module(options: dict[str, Any]) -> None:
    assert not lora_forwards(adapted(llama(), **options))[0]


def test_without_its_adapter_or_of_another_type_a_module_computes_as_before() -> None:
    model = adapted(llama())
    found = fused.prepared(model)
    with model.disable_adapter():
        before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        with found.standing_in((fused.LORA,)):
            assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    model = adapted(llama(torch.bfloat16))  # PEFT multiplies by float32 factors in float32
    plain = results(model, autocast=False)
    with fused.prepared(model).standing_in((fused.LORA,)):
        ours = results(model, autocast=False)
    assert torch.equal(plain[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))


@pytest.mark.parametrize("name", fused.FAMILIES)
def test_each_family_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    config = tiny_bases.config_of(tiny_bases.BASES[name])
    model = adapted(AutoModelForCausalLM.from_config(config), target_modules="all-linear")
    assert furthest(model) < 2e-5
