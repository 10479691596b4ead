"""Clipped sums of per-unit gradients against one record at a time, in every way to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grandrounds.data import tokenization
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import ModelError
from grandrounds.model.fused import fused
from grandrounds.model.lora import LoraSpec, adapter_parameters, add_lora
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.resident import Resident, checkpoint_activations
from grandrounds.site.private.per_unit import add_at_once, per_unit
from grandrounds.site.private.visit import microbatches
from tests.site.private.visits import (
    EXAMPLES,
    MECHANISM,
    UNITS,
    clipped_sums,
    error,
    factors_of,
    naive_sums,
    private_settings,
)
from tests.site.test_training import CPU, PAD, make
from tests.tiny_models import tiny_bases

HIGHEST_ERROR = 1e-5
"""Relative, of a clipped sum; float32 gives 3e-7."""

CLIP = MECHANISM.clipping_norm


@pytest.fixture
def resident(tiny_base: Path) -> Iterator[Resident]:
    made = make(tiny_base)
    yield made
    checkpoint_activations(made, False)


def check_all(resident: Resident, which: str, ways: list[tuple[bool, int, bool, int]]) -> None:
    """Compare clipped sums of all units: (padding-free, chunk, checkpointing, microbatch)."""
    parameters = factors_of(resident, which)
    expected = naive_sums(resident, parameters, UNITS, CLIP)
    for padding_free, chunk, checkpointing, microbatch in ways:
        checkpoint_activations(resident, checkpointing)
        forward = Forward(False, padding_free, True, chunk)
        how = private_settings(microbatch=microbatch, forward=forward)
        found = clipped_sums(resident, parameters, UNITS, how)
        assert error(found, expected) < HIGHEST_ERROR, (padding_free, chunk, checkpointing)


def test_the_clipped_sum_is_that_of_one_record_at_a_time(resident: Resident) -> None:
    """Padding-free and padded, checkpointed, chunked, and in small microbatches."""
    check_all(resident, "AB", [(True, 0, False, 16), (False, 7, True, 5), (True, 7, True, 1)])


def test_it_is_with_either_factor_alone_too(resident: Resident) -> None:
    check_all(resident, "B", [(True, 7, False, 5)])
    check_all(resident, "A", [(False, 0, False, 16)])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["AB", "B"])
def test_it_is_in_every_combination(resident: Resident, which: str) -> None:
    ways = [
        (padding_free, chunk, checkpointing, microbatch)
        for padding_free in (True, False)
        for chunk in (0, 7)
        for checkpointing in (True, False)
        for microbatch in (1, 5, 16)
    ]
    check_all(resident, which, ways)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_on_a_base_in_four_bits(tiny_base: Path, checkpointing: bool) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = make(tiny_base, quantization=4)
    check_all(quantized, "AB", [(True, 7, checkpointing, 5)])
    checkpoint_activations(quantized, False)


def test_it_is_on_a_base_in_eight_bits_record_by_record(tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    check_all(make(tiny_base, quantization=8), "AB", [(True, 0, False, 1)])


def test_a_fused_module_would_not_go_unnoticed(resident: Resident) -> None:
    """Private visits take PEFT's own modules. Fused ones do not give gradients to units."""
    forward = Forward(False, True, True, 7, fused=True)
    how = private_settings(microbatch=5, forward=forward)
    with fused(resident.model, bf16=False):  # proved here, where no unit is collected
        pass
    with pytest.raises(ModelError, match=r"cannot be trained with privacy\.unit-guarantee"):
        clipped_sums(resident, factors_of(resident, "AB"), UNITS, how)
    resident.model.zero_grad(set_to_none=True)  # what the fused modules left, past the clip


FAMILIES = ["qwen3", "gemma2", "phi3", "gpt2", "bloom", "mamba2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_on_bases_of_other_families(name: str) -> None:
    """Fused and transposed projections, soft caps, ALiBi, a state-space model; ranks by module."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_bases.config_of(tiny_bases.BASES[name])).float()
    own = ((".*1.*", 3),)  # all modules of the second layer
    spec = LoraSpec(4, 8.0, "all-linear", 0.0, rank_pattern=own)
    model = add_lora(base.requires_grad_(False), spec, name)
    found = adapter_parameters(model)
    for tensor, parameter in found.items():
        if ".lora_B." in tensor:
            torch.nn.init.normal_(parameter, std=0.1)
    resident = Resident(None, None, model, found)  # type: ignore[arg-type]
    parameters, forward = factors_of(resident), Forward(False, False, False, 0)
    vocabulary = model.get_base_model().config.vocab_size
    units = [
        [TokenizedExample(tuple(i % vocabulary for i in e.input_ids), e.prompt_tokens) for e in u]
        for u in UNITS[:3]
    ]
    expected = naive_sums(resident, parameters, units, CLIP, forward)
    sums = clipped_sums(resident, parameters, units, private_settings(forward=forward))
    assert error(sums, expected) < HIGHEST_ERROR


def test_logits_of_every_token_give_the_same(resident: Resident) -> None:
    parameters = factors_of(resident)
    sums = [
        clipped_sums(
            resident,
            parameters,
            UNITS,
            private_settings(forward=Forward(False, True, answers_only, 0)),
        )
        for answers_only in (True, False)
    ]
    assert error(*sums) < HIGHEST_ERROR


def test_a_padding_free_batch_is_many_examples(resident: Resident) -> None:
    """Opacus 1.6 takes the one row of a padding-free batch for one example."""
    parameters = factors_of(resident)
    with per_unit(resident.model, parameters, 4) as units:
        with units.of_batch([len(e.input_ids) for e in EXAMPLES[:4]], range(4), True):
            forward = Forward(False, True, True, 0)
            with attending(resident.model, forward):
                loss = answer_nll_sum(
                    resident.model, EXAMPLES[:4], PAD, CPU, forward, torch.empty(4)
                )
                loss.backward()
        units.check()
        norms = units.gradients[0].flatten(1).norm(dim=1)
    assert len(norms) == 4
    assert len({round(float(n), 6) for n in norms}) == 4


def test_a_private_visit_has_no_tail(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail would be a record of no unit, and is left out whatever the forward pass asks for."""
    monkeypatch.setattr(tokenization, "LARGEST_TAIL", 1)
    parameters = factors_of(resident, "AB")
    forward = Forward(False, True, True, 0)
    plain, tailed = (
        clipped_sums(resident, parameters, UNITS, private_settings(forward=how))
        for how in (forward, dataclasses.replace(forward, bucket_tokens=16))
    )
    assert all(map(torch.equal, plain, tailed))


def test_microbatch_is_not_the_unit(resident: Resident) -> None:
    """The clip of a mean of 5 records would be another sum; a unit split over microbatches is
    clipped as a whole."""
    parameters = factors_of(resident, "B")
    whole, cut = (
        clipped_sums(resident, parameters, UNITS, private_settings(microbatch=size))
        for size in (16, 2)
    )
    assert error(cut, whole) < HIGHEST_ERROR
    groups = [[r for unit in UNITS[i : i + 3] for r in unit] for i in range(0, len(UNITS), 3)]
    assert error(naive_sums(resident, parameters, groups, CLIP), whole) > 0.1


def test_units_fill_microbatches_and_may_be_spread_over_several() -> None:
    found = list(microbatches(UNITS, 4))
    assert [len(batch.records) for batch in found] == [4, 4, 2]
    assert [batch.slots for batch in found] == [(0, 1, 2, 2), (0, 1, 1, 2), (0, 1)]
    assert [batch.is_complete for batch in found] == [False, True, True]
    assert list(microbatches([], 4)) == []


def test_one_batched_product_adds_as_many_small_ones_do() -> None:
    """The way of a GPU: records of 3, 1 and 2 tokens, of which the last two are of one unit."""
    g, x = torch.randn(6, 4), torch.randn(6, 5)
    spans = [(0, 0, 3), (1, 3, 4), (1, 4, 6)]
    found, expected = torch.ones(2, 4, 5), torch.ones(2, 4, 5)
    add_at_once(found, g, x, spans)
    for slot, start, end in spans:
        expected[slot] += g[start:end].T @ x[start:end]
    assert torch.allclose(found, expected, atol=1e-5)


class Shared(torch.nn.Module):
    """A factor that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor(self.factor(x))  # type: ignore[no-any-return]


def test_a_factor_used_twice_adds_up() -> None:
    model, x = Shared(), torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
    parameters = list(model.parameters())
    expected = [
        torch.autograd.grad(model(part).square().sum(), parameters)[0] for part in (x[:2], x[2:])
    ]
    with per_unit(model, parameters, 2) as units:
        with units.of_batch([2, 1], [0, 1], True):
            loss = model(x).square().sum()
        loss.backward()
        units.check()
        for slot, gradient in enumerate(expected):
            assert torch.allclose(units.gradients[0][slot], gradient, rtol=1e-4)


def test_the_model_is_as_before_even_after_an_error(resident: Resident) -> None:
    parameters, names = factors_of(resident), list(resident.model.state_dict())
    modules = [m for m in resident.model.modules() if type(m) is torch.nn.Linear]

    def fails() -> None:
        with per_unit(resident.model, parameters, 2):
            assert any("forward" in m.__dict__ for m in modules)
            assert list(resident.model.state_dict()) == names
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails()
    assert not any("forward" in m.__dict__ for m in modules)


@pytest.mark.parametrize("lengths", [[3], [1, 3], [4, 4]])
def test_a_base_that_reorders_tokens_is_refused(lengths: list[int]) -> None:
    model = Shared()
    with per_unit(model, list(model.parameters()), 2) as units:
        with units.of_batch(lengths, range(len(lengths)), True):
            loss = model(torch.ones(5, 2)).sum()
        with pytest.raises(ModelError, match="mixes or reorders"):
            loss.backward()


def test_a_gradient_past_the_clip_is_refused() -> None:
    """A trained tensor that is used in another way too would leave the site unclipped."""
    model = Shared()
    with per_unit(model, list(model.parameters()), 2) as units:
        with units.of_batch([5], [0], True):
            loss = model(torch.ones(5, 2)).sum() + model.factor.weight.square().sum()
        loss.backward()
        with pytest.raises(ModelError, match="one past the clip"):
            units.check()
        with units.of_batch([5], [0], True):
            model(torch.ones(5, 2))
        with pytest.raises(ModelError, match=r"2 uses .* and 0 gradients"):
            units.check()


def test_anything_but_factors_is_refused() -> None:
    """A trained bias, the magnitudes of DoRA, a whole module."""
    biased: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    for parameters in ([biased[0].weight], [biased[0].bias], [biased[1].weight]):
        with pytest.raises(ModelError, match="factors A and B"), per_unit(biased, parameters, 1):
            pass
    model = Shared()
    model.other = torch.nn.Linear(2, 2)
    with (
        pytest.raises(ModelError, match="nothing else"),
        per_unit(model, [model.factor.weight], 1),
    ):
        pass


def test_the_mean_of_each_record_is_its_own(resident: Resident) -> None:
    """A record's loss does not follow from the answer tokens of the others."""
    forward = dataclasses.replace(private_settings().training.forward, padding_free=False)
    with torch.no_grad():
        each = [
            answer_nll_sum(resident.model, [e], PAD, CPU, forward, torch.empty(1))
            for e in EXAMPLES[:3]
        ]
        together = answer_nll_sum(resident.model, EXAMPLES[:3], PAD, CPU, forward, torch.empty(3))
        one = answer_nll_sum(resident.model, EXAMPLES[:1], PAD, CPU, forward)
    answer = len(EXAMPLES[0].input_ids) - EXAMPLES[0].prompt_tokens
    assert float(together) == pytest.approx(float(sum(each)), rel=1e-5)
    assert float(each[0]) == pytest.approx(float(one) / answer, rel=1e-5)
