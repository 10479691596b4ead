"""Local training in a visit: optimizer steps on the received adapter, with FedProx's term.

Also the held-out loss, computed without gradients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grandrounds.data.tokenization import TokenizedExample, tail_tokens
from grandrounds.errors import ModelError
from grandrounds.model.loss import Forward, answer_nll_sum, attending
from grandrounds.model.pair_loss import Preferring
from grandrounds.site import steps
from grandrounds.site.devices.group import Group
from grandrounds.site.devices.shares import Pass, backward, passes
from grandrounds.wire.schedule import VisitSchedule

_paged: list[tuple[list[torch.nn.Parameter], torch.optim.Optimizer]] = []
"""Paged optimizers made so far: at most two, for strategies that alternate the factors."""


Tail = tuple[int, int, int, int]
"""Positions of a module's A and B among the parameters; first rank, and the one after the last."""


LEAST_NORM = 1e-12
"""Smallest norm by which the ranks of a tail are divided; a tail of zeros gives zeros."""


@dataclass(frozen=True)
class VisitSettings:
    """How a visit trains."""

    accumulation_steps: int
    """Batches per optimizer step."""
    schedule: VisitSchedule
    """The learning rate of each step."""
    optimizer: str
    """A value of `train.optimizer`."""
    weight_decay: float
    """Decoupled weight decay."""
    max_grad_norm: float
    """L2 norm to which gradients are clipped; 0: no clipping."""
    proximal_mu: float
    """FedProx's mu; 0: no proximal term."""
    forward: Forward
    """How batches go through the model."""
    seed: int
    """Seed of dropout."""
    shares: int = 1
    """Shares into which each batch is divided; each is a pass of its own."""
    group: Group | None = None
    """The processes that share the passes, begun with the adapter of the visit; None: this one."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon, PyTorch's unless noise would be divided by it."""
    replayed: Sequence[Sequence[TokenizedExample]] = ()
    """What is replayed beside each batch; nothing if empty."""
    preferring: Preferring | None = None
    """How the examples count, which are preferences; None: they have one answer each."""
    turns: Sequence[Sequence[bool]] = ()
    """Which parameters a step trains, step by step in turn; all if empty."""
    rank_penalty: float = 0.0
    """Weight of the norms of `tails`: HetLoRA's lambda."""
    tails: Sequence[Tail] = ()
    """Ranks that the site would prune next; none if empty."""


@dataclass(frozen=True)
class VisitResult:
    """What a visit measured."""

    train_loss: float
    """Mean negative log-likelihood in nats per answer token, over all steps of the visit; of
    preferences the mean loss of a pair."""
    proximal_penalty: float
    """mu / 2 times the squared L2 distance to the received adapter, after the last step."""
    steps: int
    """Optimizer steps."""
    examples: int
    """Examples seen, repeats counted."""
    tokens: int
    """Tokens seen, without padding."""
    padding_tokens: int
    """Padding tokens in the batches, tails of padding-free rows included."""
    seconds: float
    """Wall-clock time of the steps."""


def train_visit(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    batches: Sequence[Sequence[TokenizedExample]],
    settings: VisitSettings,
    pad_token_id: int,
    trained: Sequence[tuple[slice, ...]] | None = None,
) -> VisitResult:
    """Train an adapter in place on the batches, in order.

    Each optimizer step minimises, over the answer tokens t of its batches,

        F(w) = - (1/T) sum_t log p(t) + mu/2 ||w - w_round||^2

    (FedProx: Li et al., 2020, equation 2) with AdamW; the gradient of the whole sum is clipped.
    With `turns`, a step moves some of the parameters, and AdamW's moments of the others rest too.
    With replay, T and the sum also run over the answer tokens of the replayed examples, in passes
    of their own; what the visit reports is of the site's own. Of preferences the first term is the
    mean loss of their pairs (`model.pair_loss`).

    Parameters
    ----------
    model
        A model that returns `.logits` of (batch, tokens, vocabulary).
    parameters
        The adapter's parameters; their values on entry are w_round.
    batches
        Tokenised examples; a last group smaller than `accumulation_steps` makes a step of its own.
    trained
        The trained part of each parameter; None: all of it.
    """
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    received = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(parameters, settings)
    device = parameters[0].device
    nll_sum, terms = 0.0, 0
    size, group = settings.accumulation_steps, settings.group
    plan = [
        passes(
            *(batches[i : i + size], settings.shares, settings.seed, step),
            settings.replayed[i : i + size],
        )
        for step, i in enumerate(range(0, len(batches), size))
    ]

    def own(one: Pass) -> torch.Tensor:
        how, preferring = settings.forward, settings.preferring
        return backward(model, one, pad_token_id, device, how, preferring)

    model.train()
    for step, of_step in enumerate(plan):
        set_learning_rate(optimizer, settings.schedule.rate(step, len(plan)))
        optimizer.zero_grad(set_to_none=True)
        if group and step:
            group.step()
        losses = group.losses(of_step, own) if group else map(own, of_step)
        for one, loss in zip(of_step, losses, strict=True):
            if one.own:
                nll_sum += loss  # type: ignore[assignment]
                terms += sum(e.terms for e in one.examples)
        if settings.turns:
            rest(parameters, settings.turns[step % len(settings.turns)])
        if trained is not None:
            keep_gradient(parameters, trained)
        add_proximal_gradient(parameters, received, settings.proximal_mu)
        add_rank_gradient(parameters, settings.tails, settings.rank_penalty)
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        steps.step(step + 1, len(plan))
    optimizer.zero_grad(set_to_none=True)
    seen = [e for batch in batches for e in batch]
    tokens = sum(e.tokens for e in seen)
    own_passes = [one for of_step in plan for one in of_step if one.own]
    carried = sum(positions(one.examples, settings.forward) for one in own_passes)
    train_loss = float(nll_sum) / terms
    return VisitResult(
        train_loss=train_loss,
        proximal_penalty=proximal_penalty(parameters, received, settings.proximal_mu),
        steps=len(plan),
        examples=len(seen),
        tokens=tokens,
        padding_tokens=carried - tokens,
        seconds=time.perf_counter() - started,
    )


def positions(batch: Sequence[TokenizedExample], forward: Forward) -> int:
    """Return the number of tokens of a batch in the model, padding included."""
    lengths = [len(answer.input_ids) for e in batch for answer in e.answers]
    if not forward.padding_free:
        return len(lengths) * max(lengths)
    return sum(lengths) + tail_tokens(sum(lengths), forward.bucket_tokens)


def rest(parameters: Sequence[torch.nn.Parameter], moves: Sequence[bool]) -> None:
    """Take the gradient of the parameters that rest in a step, whose values and moments stay."""
    for parameter, does in zip(parameters, moves, strict=True):
        if not does:
            parameter.grad = None


@torch.no_grad()
def keep_gradient(
    parameters: Sequence[torch.nn.Parameter], trained: Sequence[tuple[slice, ...]]
) -> None:
    """Zero the gradient of every parameter outside its trained part."""
    for parameter, part in zip(parameters, trained, strict=True):
        if parameter.grad is not None:
            kept = parameter.grad[part].clone()
            parameter.grad.zero_()
            parameter.grad[part] = kept


@torch.no_grad()
def add_proximal_gradient(
    parameters: Sequence[torch.nn.Parameter], received: Sequence[torch.Tensor], mu: float
) -> None:
    """Add the gradient of mu/2 ||w - w_round||^2, which is mu (w - w_round), to `.grad`."""
    if not mu:
        return
    # A module that took no part (an expert not routed to) has no gradient and does not move.
    moved = [(p, r) for p, r in zip(parameters, received, strict=True) if p.grad is not None]
    distance = torch._foreach_sub([p for p, _ in moved], [r for _, r in moved])
    torch._foreach_add_([p.grad for p, _ in moved if p.grad is not None], distance, alpha=mu)


@torch.no_grad()
def add_rank_gradient(
    parameters: Sequence[torch.nn.Parameter], tails: Sequence[Tail], weight: float
) -> None:
    """Add the gradient of weight * sum ||A_t|| ||B_t|| over the tails to `.grad`.

    d/dB_t = weight ||A_t|| B_t / ||B_t||, and the other way round; 0 where B_t is zero (HetLoRA:
    Cho et al., 2024).
    """
    for place_a, place_b, first, stop in tails:
        a, b = parameters[place_a], parameters[place_b]
        if a.grad is None or b.grad is None:
            continue
        tail_a, tail_b = a[first:stop], b[:, first:stop]
        norm_a, norm_b = tail_a.norm(), tail_b.norm()
        a.grad[first:stop] += weight * norm_b / norm_a.clamp_min(LEAST_NORM) * tail_a
        b.grad[:, first:stop] += weight * norm_a / norm_b.clamp_min(LEAST_NORM) * tail_b


@torch.no_grad()
def proximal_penalty(
    parameters: Sequence[torch.nn.Parameter], received: Sequence[torch.Tensor], mu: float
) -> float:
    """Return mu/2 ||w - w_round||^2."""
    squares = [(p - r).double().square().sum() for p, r in zip(parameters, received, strict=True)]
    return 0.5 * mu * float(sum(torch.stack(squares).tolist()))  # read from a GPU at once


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], settings: VisitSettings
) -> torch.optim.Optimizer:
    """Return a fresh AdamW (Loshchilov and Hutter, 2019) as configured.

    Raises
    ------
    ModelError
        If an 8-bit optimizer is configured and bitsandbytes does not load.
    """
    rate, decay, epsilon = settings.schedule.peak, settings.weight_decay, settings.adam_epsilon
    if settings.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, eps=epsilon, fused=True)
    check_optimizer(settings.optimizer)
    import bitsandbytes

    if settings.optimizer == "adamw_8bit":
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            parameters, lr=rate, weight_decay=decay, eps=epsilon
        )
        return optimizer
    return _paged_optimizer(parameters, rate, decay, epsilon)


def _paged_optimizer(
    parameters: Sequence[torch.nn.Parameter], rate: float, decay: float, epsilon: float
) -> torch.optim.Optimizer:
    """Return a fresh paged 8-bit AdamW, reusing the one made for the same parameters.

    bitsandbytes (0.50) never frees the managed memory of a paged optimizer, so one per visit would
    leak. Instead, its state is reset to the initial zeros.
    """
    import bitsandbytes

    same = [made for of, made in _paged if list(map(id, of)) == list(map(id, parameters))]
    if not same:
        new = bitsandbytes.optim.PagedAdamW8bit(
            parameters, lr=rate, weight_decay=decay, eps=epsilon
        )
        _paged[:] = [*_paged[-1:], (list(parameters), new)]
        return new  # type: ignore[no-any-return]
    optimizer = same[0]
    for group in optimizer.param_groups:
        group["weight_decay"], group["eps"] = decay, epsilon
    for state in optimizer.state.values():
        state["step"] = 0
        for name in ("state1", "state2", "absmax1", "absmax2"):
            if getattr(state.get(name), "is_paged", False):
                bitsandbytes.functional.fill(state[name], 0)
            elif name in state:
                state[name].zero_()
    return optimizer


def check_optimizer(name: str) -> None:
    """Raise `ModelError` if this machine cannot run an optimizer."""
    if name == "adamw_torch":
        return
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f'train.optimizer = "{name}" needs bitsandbytes, which does not load here ({error}). '
            'Install it, or set train.optimizer = "adamw_torch".'
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def held_out_loss(
    model: Any,
    examples: Sequence[TokenizedExample],
    batch_size: int,
    pad_token_id: int,
    forward: Forward,
    group: Group | None = None,
) -> tuple[float, int]:
    """Return the summed negative log-likelihood (nats) and the number of answer tokens.

    Batches go to the processes of a group in turn; their sum is in the same order without one.
    """
    model.eval()
    device = next(model.parameters()).device
    lengths = [len(e.input_ids) for e in examples]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [
        [examples[place] for place in by_length[i : i + batch_size]]
        for i in range(0, len(by_length), batch_size)
    ]

    def own(batch: Sequence[TokenizedExample]) -> float:
        return float(answer_nll_sum(model, batch, pad_token_id, device, forward))

    with attending(model, forward):
        total = 0.0
        for nll in group.evaluated(batches, own) if group else map(own, batches):
            total += nll
    return total, sum(e.answer_tokens for e in examples)
