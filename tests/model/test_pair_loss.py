"""The loss of preferences against an independent one of a few lines, and against TRL's."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.loss import Forward
from grandrounds.model.pair_loss import Preferring, losses
from grandrounds.model.resident import Resident, adapter_off
from grandrounds.site.devices.shares import backward, passes
from tests.places import ROOT
from tests.site.test_training import CPU, LEAN, LORA, PAD, make, settings, visit

PADDED = Forward(bf16=False, padding_free=False, answers_only=True, chunk_tokens=0)
WHOLE = Forward(bf16=False, padding_free=False, answers_only=False, chunk_tokens=0)


def pairs_of(*lengths: tuple[int, int, int]) -> list[TokenizedExample]:
    """Return pairs of random tokens, given the lengths of prompt, chosen and rejected answer."""
    rng = np.random.default_rng(3)
    made = []
    for prompt, chosen, rejected in lengths:
        ids, other = (rng.integers(2, 384, n).tolist() for n in (prompt + chosen, rejected))
        made.append(TokenizedExample(tuple(ids), prompt, rejected=tuple(other)))
    return made


PAIRS = pairs_of((3, 5, 2), (6, 1, 7), (2, 4, 4), (5, 3, 6))


def likelihood(
    model: torch.nn.Module, ids: tuple[int, ...], prompt: int, mean: bool
) -> torch.Tensor:
    """Return the log-probability of what follows a prompt, of one sequence by itself."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    told = log_softmax(logits, -1)[range(prompt - 1, len(ids) - 1), list(ids[prompt:])]
    return told.mean() if mean else told.sum()


def plain(
    resident: Resident, pairs: list[TokenizedExample], beta: float, mean: bool
) -> torch.Tensor:
    """Return the mean DPO loss of pairs, equation 7 of Rafailov et al. written out."""

    def ratio(pair: TokenizedExample) -> torch.Tensor:
        n = pair.prompt_tokens
        rejected = (*pair.input_ids[:n], *pair.rejected)
        chosen = likelihood(resident.model, pair.input_ids, n, mean)
        return chosen - likelihood(resident.model, rejected, n, mean)

    with torch.no_grad(), adapter_off(resident):
        known = [ratio(pair) for pair in pairs]
    margins = [beta * (ratio(pair) - ref) for pair, ref in zip(pairs, known, strict=True)]
    return torch.stack([torch.log1p(torch.exp(-margin)) for margin in margins]).mean()


def preferring(resident: Resident, pairs: list[TokenizedExample], mean: bool = False) -> Preferring:
    how = Preferring(0.7, mean)
    with adapter_off(resident):
        known = how.known_ratios(resident.model, pairs, 3, PAD, LEAN)
    return dataclasses.replace(how, reference=known)


def gradients(resident: Resident) -> list[torch.Tensor]:
    found = []
    for parameter in resident.parameters.values():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


@pytest.mark.parametrize("mean", [False, True], ids=["summed", "normalised"])
@pytest.mark.parametrize("how", [LEAN, PADDED, WHOLE], ids=["padding-free", "padded", "all logits"])
def test_loss_and_gradient_are_those_of_the_equation(
    tiny_base: Path, how: Forward, mean: bool
) -> None:
    resident = make(tiny_base)
    expected = plain(resident, PAIRS, 0.7, mean)
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = gradients(resident)
    [one] = passes([PAIRS], 1, 0, 0)
    total = backward(resident.model, one, PAD, CPU, how, preferring(resident, PAIRS, mean))
    assert float(total) / len(PAIRS) == pytest.approx(float(expected.detach()), abs=1e-6)
    for found, other in zip(gradients(resident), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)


def test_micro_batches_train_as_the_whole_batch(tiny_base: Path) -> None:
    resident = make(tiny_base)
    how = preferring(resident, PAIRS)
    whole, of_whole = visit(resident, [PAIRS], preferring=how)
    resident = make(tiny_base)
    batches = [PAIRS[:1], PAIRS[1:]]  # of different sizes: every pair counts the same
    parts, of_parts = visit(resident, batches, accumulation_steps=2, preferring=how)
    assert (of_whole.steps, of_parts.steps) == (1, 1)
    assert of_parts.train_loss == pytest.approx(of_whole.train_loss, abs=1e-6)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_visit_counts_the_tokens_of_both_answers(tiny_base: Path) -> None:
    resident = make(tiny_base)
    _, result = visit(resident, [PAIRS], preferring=preferring(resident, PAIRS))
    assert (result.examples, result.tokens) == (4, 8 + 5 + 7 + 13 + 6 + 6 + 8 + 11)
    assert result.padding_tokens == 0


def test_with_the_adapter_off_margins_are_0_and_what_has_a_gradient_stays(tiny_base: Path) -> None:
    resident = make(tiny_base)
    frozen = next(iter(resident.parameters.values())).requires_grad_(False)
    with adapter_off(resident):
        how = preferring(resident, PAIRS)
        ratios = how.known_ratios(resident.model, PAIRS, 3, PAD, LEAN)
    assert [p.requires_grad for p in resident.parameters.values()].count(False) == 1
    assert not frozen.requires_grad
    margins = how.margins(torch.tensor([ratios[pair] for pair in PAIRS]), PAIRS)
    assert margins.tolist() == [0.0] * 4
    assert losses(margins).tolist() == pytest.approx([math.log(2)] * 4)
    frozen.requires_grad_(True)


def test_fedprox_adds_its_gradient_to_that_of_pairs(tiny_base: Path) -> None:
    resident = make(tiny_base)
    how = preferring(resident, PAIRS)
    _, without = visit(resident, [PAIRS] * 6, preferring=how)
    resident = make(tiny_base)
    _, held = visit(resident, [PAIRS] * 6, preferring=how, proximal_mu=50.0)
    assert without.proximal_penalty == 0 < held.proximal_penalty
    assert held.train_loss > without.train_loss
    assert settings().preferring is None
    assert LORA.dropout == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL's own arguments
def test_loss_and_gradient_are_those_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dpo_against_trl

    found = list(dpo_against_trl.differences())
    assert [(one.reference, one.length_normalised) for one in found] == [
        *(("base", False), ("base", True), ("received", False), ("received", True))
    ]
    for one in found:
        assert one.of_loss <= 1e-5
        assert one.of_gradient <= 1e-5 < one.gradient
