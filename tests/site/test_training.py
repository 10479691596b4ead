"""A visit against losses and gradients worked out apart from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grandrounds.data import tokenization
from grandrounds.data.tokenization import TokenizedExample, collate
from grandrounds.model.base import BaseSpec
from grandrounds.model.lora import LoraSpec
from grandrounds.model.loss import Forward
from grandrounds.model.resident import Resident, checkpoint_activations, resident_model, set_adapter
from grandrounds.site import training
from grandrounds.site.training import (
    VisitResult,
    VisitSettings,
    add_proximal_gradient,
    held_out_loss,
    proximal_penalty,
    train_visit,
)
from grandrounds.wire.adapter import initial_adapter
from grandrounds.wire.schedule import VisitSchedule

PAD = 0
LEAN = Forward(bf16=True, padding_free=True, answers_only=True, chunk_tokens=5)
LORA = LoraSpec(4, 8.0, "q_proj,v_proj", 0.0)
CPU = torch.device("cpu")
Batches = list[list[TokenizedExample]]


def examples_of(lengths: list[int], seed: int = 0) -> list[TokenizedExample]:
    """Return examples of random tokens, the first third of each its prompt."""
    rng = np.random.default_rng(seed)
    return [
        TokenizedExample(tuple(int(i) for i in rng.integers(2, 384, length)), max(1, length // 3))
        for length in lengths
    ]


EXAMPLES = examples_of([9, 14, 6, 11, 8, 12, 10, 7])
FOUR_BATCHES: Batches = [EXAMPLES[i : i + 2] for i in range(0, 8, 2)]


def make(
    tiny_base: Path,
    lora: LoraSpec = LORA,
    quantization: int = 0,
    checkpointing: bool | int = False,
) -> Resident:
    """Return the tiny model with an adapter whose A and B are both random, the same each time."""
    spec = BaseSpec(str(tiny_base), quantization, "float32")
    resident = resident_model(spec, lora)
    checkpoint_activations(resident, checkpointing)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    rng = np.random.default_rng(0)
    adapter = dict(initial_adapter(shapes, rng))
    for name, tensor in adapter.items():
        if ".lora_B." in name:
            adapter[name] = (0.1 * rng.normal(size=tensor.shape)).astype(np.float32)
    set_adapter(resident, adapter)
    return resident


def settings(**changes: Any) -> VisitSettings:
    options: dict[str, Any] = {
        "accumulation_steps": 1,
        "schedule": VisitSchedule(1e-2, 0),
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "proximal_mu": 0.0,
        "forward": LEAN,
        "seed": 5,
    }
    return VisitSettings(**{**options, **changes})


def weights(resident: Resident) -> list[torch.Tensor]:
    return [p.detach().clone() for p in resident.parameters.values()]


def visit(
    resident: Resident, batches: Batches, **changes: Any
) -> tuple[list[torch.Tensor], VisitResult]:
    """Return the adapter after a visit, and what it measured."""
    parameters = list(resident.parameters.values())
    result = train_visit(resident.model, parameters, batches, settings(**changes), PAD)
    return weights(resident), result


Steps = list[tuple[list[torch.Tensor], float]]


@contextmanager
def recorded_steps() -> Iterator[Steps]:
    """Record (gradients, learning rate) as every optimizer step sees them."""
    steps: Steps = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        [group] = optimizer.param_groups
        steps.append(([p.grad.clone() for p in group["params"]], group["lr"]))

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield steps
    finally:
        handle.remove()


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors)))  # type: ignore[arg-type]


# --- FedProx --------------------------------------------------------------------------------------


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    """mu = 0.5, w = (1, 2), w0 = (0.5, 3): 0.5 (0.5, -1) = (0.25, -0.5) on top of (0.1, 0.2)."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    w.grad = torch.tensor([0.1, 0.2])
    add_proximal_gradient([w], [torch.tensor([0.5, 3.0])], 0.5)
    assert w.grad.tolist() == pytest.approx([0.35, -0.3])
    assert w.tolist() == [1.0, 2.0]


def test_the_proximal_gradient_is_that_of_the_penalty() -> None:
    """d/dw mu/2 (w - w0)^2 = mu (w - w0), by autograd."""
    w0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    w = torch.nn.Parameter(w0 + 0.3)
    (0.5 * 0.7 * (w - w0).square().sum()).backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    expected = w.grad.clone()
    w.grad = torch.zeros_like(w)
    add_proximal_gradient([w], [w0], 0.7)
    assert torch.allclose(w.grad, expected, atol=1e-7)


def test_without_mu_gradients_stay_as_they_are() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([0.1, 0.2])
    add_proximal_gradient([w], [torch.zeros(2)], 0.0)
    assert torch.equal(w.grad, torch.tensor([0.1, 0.2]))


def test_a_parameter_without_a_gradient_does_not_shift_the_others() -> None:
    """Only the second of two has one: its own distance is added, 1 + 0.5 (3 - 1) = 2."""
    unused = torch.nn.Parameter(torch.tensor([9.0]))
    used = torch.nn.Parameter(torch.tensor([3.0]))
    used.grad = torch.tensor([1.0])
    add_proximal_gradient([unused, used], [torch.tensor([9.0]), torch.tensor([1.0])], 0.5)
    assert used.grad.tolist() == [2.0]


def test_the_penalty_is_half_mu_times_the_squared_distance() -> None:
    """0.5 * 0.5 * (0.25 + 1) + nothing of the second tensor = 0.3125."""
    w = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(2, 2))]
    w0 = [torch.tensor([0.5, 3.0]), torch.ones(2, 2)]
    assert proximal_penalty(w, w0, 0.5) == 0.3125
    assert proximal_penalty(w, w0, 0.0) == 0.0


def test_the_first_step_knows_no_distance(tiny_base: Path) -> None:
    """At the first step w = w0, so the proximal gradient is zero whatever mu is."""
    without, _ = visit(make(tiny_base), FOUR_BATCHES[:1])
    with_mu, _ = visit(make(tiny_base), FOUR_BATCHES[:1], proximal_mu=10.0)
    assert all(torch.equal(a, b) for a, b in zip(without, with_mu, strict=True))


def test_the_second_step_differs_by_the_proximal_gradient(tiny_base: Path) -> None:
    """Both runs stand at the same w1 after one step, so their gradients differ by mu (w1 - w0)."""
    start = weights(make(tiny_base))
    after_one, _ = visit(make(tiny_base), FOUR_BATCHES[:1])
    with recorded_steps() as plain:
        without, _ = visit(make(tiny_base), FOUR_BATCHES[:2])
    with recorded_steps() as proximal:
        with_mu, _ = visit(make(tiny_base), FOUR_BATCHES[:2], proximal_mu=3.0)
    for g, g_mu, w1, w0 in zip(plain[1][0], proximal[1][0], after_one, start, strict=True):
        assert torch.allclose(g_mu - g, 3.0 * (w1 - w0), atol=1e-6)
        assert float((w1 - w0).abs().max()) > 1e-3
    assert not any(torch.equal(a, b) for a, b in zip(without, with_mu, strict=True))


def test_a_visit_minimises_the_loss_with_the_proximal_term(tiny_base: Path) -> None:
    """Against a plain loop in which autograd differentiates F(w) as it is written."""
    mu = 2.0
    ours, result = visit(make(tiny_base), FOUR_BATCHES, proximal_mu=mu, weight_decay=0.1)
    resident = make(tiny_base)
    parameters = list(resident.parameters.values())
    start = weights(resident)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for batch in FOUR_BATCHES:
        optimizer.zero_grad()
        loss = resident.model(**collate(batch, PAD)).loss
        distance = sum((p - s).square().sum() for p, s in zip(parameters, start, strict=True))
        (loss + 0.5 * mu * distance).backward()
        optimizer.step()
    for a, b in zip(ours, parameters, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    expected = 0.5 * mu * norm([a - b for a, b in zip(ours, start, strict=True)]) ** 2
    assert result.proximal_penalty == pytest.approx(expected, rel=1e-6)


def test_a_large_mu_keeps_the_adapter_near(tiny_base: Path) -> None:
    start = weights(make(tiny_base))
    moved = {}
    for mu in (0.0, 100.0):
        end, _ = visit(make(tiny_base), FOUR_BATCHES * 4, proximal_mu=mu)
        moved[mu] = norm([a - b for a, b in zip(end, start, strict=True)])
    assert moved[100.0] < 0.5 * moved[0.0]


# --- Loss, accumulation, clipping, warm-up --------------------------------------------------------


def test_the_loss_is_the_mean_over_answer_tokens_as_hugging_face_has_it(tiny_base: Path) -> None:
    batch = EXAMPLES[:4]
    resident = make(tiny_base)
    with torch.no_grad():
        expected = float(resident.model(**collate(batch, PAD)).loss)
    _, result = visit(resident, [batch])
    assert result.train_loss == pytest.approx(expected, rel=1e-6)


def test_two_accumulated_batches_equal_one_of_twice_the_size(tiny_base: Path) -> None:
    """Of unequal numbers of answer tokens: the mean is over tokens, not over batches."""
    small = [EXAMPLES[:2], EXAMPLES[2:4]]
    tokens = [sum(len(e.input_ids) - e.prompt_tokens for e in batch) for batch in small]
    assert tokens[0] != tokens[1]
    with recorded_steps() as accumulated:
        two, first = visit(make(tiny_base), small, accumulation_steps=2)
    with recorded_steps() as at_once:
        one, second = visit(make(tiny_base), [EXAMPLES[:4]])
    assert first.steps == second.steps == len(accumulated) == len(at_once) == 1
    assert first.train_loss == pytest.approx(second.train_loss, rel=1e-6)
    for a, b in zip(accumulated[0][0], at_once[0][0], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(two, one, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_last_group_that_is_smaller_is_a_step_of_its_own(tiny_base: Path) -> None:
    _, result = visit(make(tiny_base), FOUR_BATCHES[:3], accumulation_steps=2)
    assert result.steps == 2


def test_gradients_are_clipped_to_the_norm_and_0_leaves_them(tiny_base: Path) -> None:
    with recorded_steps() as free:
        visit(make(tiny_base), FOUR_BATCHES[:1], max_grad_norm=0.0)
    with recorded_steps() as clipped:
        visit(make(tiny_base), FOUR_BATCHES[:1], max_grad_norm=0.01)
    with recorded_steps() as loose:
        visit(make(tiny_base), FOUR_BATCHES[:1], max_grad_norm=1e6)
    full = norm(free[0][0])
    assert full > 0.02
    assert norm(clipped[0][0]) == pytest.approx(0.01, rel=1e-3)
    for a, b, c in zip(free[0][0], clipped[0][0], loose[0][0], strict=True):
        assert torch.allclose(b, a * (0.01 / full), rtol=1e-3, atol=1e-9)
        assert torch.equal(a, c)


def test_clipping_is_of_the_gradient_with_the_proximal_term(tiny_base: Path) -> None:
    with recorded_steps() as steps:
        visit(make(tiny_base), FOUR_BATCHES, proximal_mu=1000.0, max_grad_norm=0.5)
    assert all(norm(gradients) <= 0.5 * (1 + 1e-4) for gradients, _ in steps)


def test_the_rate_rises_over_the_warm_up_steps(tiny_base: Path) -> None:
    """Two of them: a third, two thirds, then all of 0.03."""
    with recorded_steps() as steps:
        visit(make(tiny_base), FOUR_BATCHES, schedule=VisitSchedule(0.03, 2))
    assert [rate for _, rate in steps] == pytest.approx([0.01, 0.02, 0.03, 0.03])


def test_weight_decay_shrinks_by_rate_times_decay(tiny_base: Path) -> None:
    """AdamW: w - lr * decay * w - lr * step: with 0.5 and 0.01, half a per cent of w less."""
    start = weights(make(tiny_base))
    plain, _ = visit(make(tiny_base), FOUR_BATCHES[:1])
    decayed, _ = visit(make(tiny_base), FOUR_BATCHES[:1], weight_decay=0.5)
    for w, a, b in zip(start, plain, decayed, strict=True):
        assert torch.allclose(a - b, 0.005 * w, atol=1e-6)


def test_what_a_visit_counts(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths 9, 14 | 6, 11: 40 tokens; padding 5 + 5 = 10, where there is any.

    Rows of 23 and 17 tokens have no room for a tail below a 16th; if it may be as long as the row,
    they are filled up to 32: 9 + 15 = 24.
    """
    padded = dataclasses.replace(LEAN, padding_free=False)
    tailed = dataclasses.replace(LEAN, bucket_tokens=16)
    for how, padding in ((LEAN, 0), (padded, 10), (tailed, 0)):
        _, result = visit(make(tiny_base), FOUR_BATCHES[:2], forward=how)
        assert (result.steps, result.examples, result.tokens) == (2, 4, 40)
        assert result.padding_tokens == padding
    monkeypatch.setattr(tokenization, "LARGEST_TAIL", 1)
    _, result = visit(make(tiny_base), FOUR_BATCHES[:2], forward=tailed)
    assert (result.tokens, result.padding_tokens) == (40, 24)
    assert result.seconds > 0


# --- Reproducibility and dropout ------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_seed_gives_the_same_bits(tiny_base: Path, dropout: float) -> None:
    lora = LoraSpec(4, 8.0, "q_proj,v_proj", dropout)
    first, one = visit(make(tiny_base, lora), FOUR_BATCHES, seed=11)
    torch.manual_seed(999)
    second, two = visit(make(tiny_base, lora), FOUR_BATCHES, seed=11)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert one.train_loss == two.train_loss


def test_dropout_comes_from_the_seed(tiny_base: Path) -> None:
    lora = LoraSpec(4, 8.0, "q_proj,v_proj", 0.5)
    first, _ = visit(make(tiny_base, lora), FOUR_BATCHES, seed=11)
    second, _ = visit(make(tiny_base, lora), FOUR_BATCHES, seed=12)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_dropout_the_seed_changes_nothing(tiny_base: Path) -> None:
    first, _ = visit(make(tiny_base), FOUR_BATCHES, seed=11)
    second, _ = visit(make(tiny_base), FOUR_BATCHES, seed=12)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_visit_begins_without_memory_of_the_one_before(tiny_base: Path) -> None:
    fresh, _ = visit(make(tiny_base), FOUR_BATCHES)
    visit(make(tiny_base), FOUR_BATCHES * 2, schedule=VisitSchedule(0.1, 0))
    again, _ = visit(make(tiny_base), FOUR_BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_the_base_is_not_touched(tiny_base: Path) -> None:
    resident = make(tiny_base)
    frozen = {n: p.detach().clone() for n, p in resident.model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    visit(resident, FOUR_BATCHES)
    for name, parameter in resident.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            assert parameter.grad is None


# --- Held-out loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_held_out_loss_is_the_sum_over_answer_tokens(tiny_base: Path, batch_size: int) -> None:
    resident = make(tiny_base, LoraSpec(4, 8.0, "q_proj,v_proj", 0.5))
    resident.model.train()
    loss, tokens = held_out_loss(resident.model, EXAMPLES, batch_size, PAD, LEAN)
    assert tokens == sum(len(e.input_ids) - e.prompt_tokens for e in EXAMPLES)
    with torch.no_grad():
        expected = float(resident.model.eval()(**collate(EXAMPLES, PAD)).loss) * tokens
    assert loss == pytest.approx(expected, rel=1e-6)


# --- 8 bits, 4 bits, checkpointing ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_trains_on_the_cpu(tiny_base: Path, optimizer: str) -> None:
    """With tensors of 4096 numbers and more: below that bitsandbytes keeps 32 bits."""
    lora = LoraSpec(128, 128.0, "q_proj,v_proj", 0.0)
    resident = make(tiny_base, lora)
    assert max(p.numel() for p in resident.parameters.values()) >= 4096
    _, first = visit(resident, [EXAMPLES], optimizer=optimizer, schedule=VisitSchedule(5e-3, 0))
    visit(resident, [EXAMPLES] * 15, optimizer=optimizer, schedule=VisitSchedule(5e-3, 0))
    _, last = visit(resident, [EXAMPLES], optimizer=optimizer, schedule=VisitSchedule(5e-3, 0))
    assert last.train_loss < 0.95 * first.train_loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_an_nf4_base_trains_on_the_cpu(tiny_base: Path, checkpointing: bool) -> None:
    lora = LoraSpec(16, 32.0, "all-linear", 0.0)
    resident = make(tiny_base, lora, quantization=4, checkpointing=checkpointing)
    _, first = visit(resident, [EXAMPLES])
    visit(resident, [EXAMPLES] * 15)
    _, last = visit(resident, [EXAMPLES])
    # the head is frozen and random: its logits reach no further than about a tenth of the loss
    assert last.train_loss < 0.95 * first.train_loss


@pytest.mark.parametrize("lora", [LORA, LoraSpec(4, 8.0, "all-linear", 0.2)], ids=["q,v", "all"])
def test_gradient_checkpointing_of_some_or_all_layers_changes_no_bit(
    tiny_base: Path, lora: LoraSpec
) -> None:
    """With dropout too, whose masks are drawn again."""
    plain, one = visit(make(tiny_base, lora), FOUR_BATCHES)
    for checkpointing in (1, True):
        kept, two = visit(make(tiny_base, lora, checkpointing=checkpointing), FOUR_BATCHES)
        assert one.train_loss == two.train_loss
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_gradient_checkpointing_is_really_on_in_the_first_layers(tiny_base: Path) -> None:
    """A layer is computed twice in a step with it: forward, and again in the backward pass."""
    calls = {}
    for name, checkpointing in (("none", False), ("one", 1), ("all", True), ("none again", 0)):
        resident = make(tiny_base, checkpointing=checkpointing)
        count = [0, 0]
        handles = []
        for place, layer in enumerate(resident.model.base_model.model.model.layers):

            def note(*_: Any, place: int = place, count: list[int] = count) -> None:
                count[place] += 1

            handles.append(layer.mlp.register_forward_pre_hook(note))
        visit(resident, [EXAMPLES])
        for handle in handles:
            handle.remove()
        calls[name] = count
    assert calls == {"none": [1, 1], "one": [2, 1], "all": [2, 2], "none again": [1, 1]}


def test_a_paged_optimizer_used_again_begins_without_history(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes never frees its paged memory, so one optimizer serves all visits of a process:
    the second visit is that of a new optimizer, bit for bit."""
    lora = LoraSpec(128, 128.0, "q_proj,v_proj", 0.0)
    monkeypatch.setattr(training, "_paged", [])
    new, _ = visit(make(tiny_base, lora), FOUR_BATCHES, optimizer="paged_adamw_8bit")
    [(_, made)] = training._paged
    again, _ = visit(make(tiny_base, lora), FOUR_BATCHES, optimizer="paged_adamw_8bit")
    assert [optimizer for _, optimizer in training._paged] == [made]
    for first, second in zip(new, again, strict=True):
        assert torch.equal(first, second)


def test_parameters_that_take_turns_move_in_their_own_steps_by_adamw_of_those(
    tiny_base: Path,
) -> None:
    """Four steps, B in 1 and 3, A in 2 and 4: AdamW alone on each factor's own gradients, at the
    values that the other has by then, gives the same bits."""
    resident = make(tiny_base)
    names = list(resident.parameters)
    is_b = [".lora_B." in name for name in names]
    turns = [is_b, [not b for b in is_b]]
    found, _ = visit(resident, FOUR_BATCHES, turns=turns)
    alone = make(tiny_base)
    start = weights(alone)
    parameters = list(alone.parameters.values())
    optimizers = [
        torch.optim.AdamW(
            [p for p, moves in zip(parameters, turn, strict=True) if moves],
            lr=1e-2,
            weight_decay=0.0,
            fused=True,
        )
        for turn in turns
    ]
    plan = VisitSchedule(1e-2, 0)
    alone.model.train()
    for step, batch in enumerate(FOUR_BATCHES):
        optimizer = optimizers[step % 2]
        training.set_learning_rate(optimizer, plan.rate(step, 4))
        for p in parameters:
            p.grad = None
        torch.manual_seed(5)
        loss = training.answer_nll_sum(alone.model, batch, PAD, CPU, LEAN)
        (loss / sum(e.answer_tokens for e in batch)).backward()
        optimizer.step()
    for name, one, other, before in zip(names, found, weights(alone), start, strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
        assert not torch.equal(one, before)


def test_a_resting_parameter_is_not_decayed_either(tiny_base: Path) -> None:
    resident = make(tiny_base)
    start = weights(resident)
    is_b = [".lora_B." in name for name in resident.parameters]
    found, result = visit(resident, FOUR_BATCHES, turns=[is_b], weight_decay=0.1, proximal_mu=0.5)
    assert result.proximal_penalty > 0
    for b, one, before in zip(is_b, found, start, strict=True):
        assert torch.equal(one, before) == (not b)


def test_the_penalty_of_the_ranks_to_prune_has_the_gradient_of_autograd() -> None:
    """lambda ||A[2:4]|| ||B[:, 2:4]||, on a layer that is not square; a B of zero has none."""
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.nn.Parameter(torch.randn(s, generator=draw)) for s in ((4, 7), (5, 4)))
    (0.3 * a[2:4].norm() * b[:, 2:4].norm()).backward()
    expected = [p.grad.clone() for p in (a, b) if p.grad is not None]
    for p in (a, b):
        p.grad = torch.zeros_like(p)
    training.add_rank_gradient([a, b], [(0, 1, 2, 4)], 0.3)
    for p, gradient in zip((a, b), expected, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6)
        assert gradient.abs().max() > 0.01
    with torch.no_grad():
        b.zero_()
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    training.add_rank_gradient([a, b], [(0, 1, 2, 4)], 0.3)
    assert not a.grad.any()
    assert not b.grad.any()
