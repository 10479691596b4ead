"""Local training under differential privacy: DP-SGD on the units of a site (Abadi et al., 2016).

What it guarantees: the adapter that leaves differs in distribution by at most the accountant's
(ε, delta) when one unit, a record or all records of a patient, is added or removed. It holds
against the server, the other sites and whoever has the model, as long as the site's coins are
secret. It does not hide how long a visit takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model.loss import answer_nll_sum, attending
from grandrounds.site import steps, training
from grandrounds.site.private.clipping import add_clipped
from grandrounds.site.private.coins import Coins
from grandrounds.site.private.mechanism import LARGEST_LOSS, LOSS_NOISE, Mechanism
from grandrounds.site.private.per_unit import UnitGradients, per_unit
from grandrounds.site.private.poisson import drawn_units
from grandrounds.site.training import VisitSettings

Unit = Sequence[TokenizedExample]
"""All records of a unit that train."""

LEAST_ADAM_EPSILON = 1e-6
"""AdamW divides by the root of its second moment plus this: with less, noise alone would move a
value whose gradients are 0."""

GRID = 2.0**-20
"""Spacing of released sums, in clipping norms: it drops the low bits of the noise's arithmetic."""


@dataclass(frozen=True)
class PrivateSettings:
    """How a private visit trains."""

    mechanism: Mechanism
    """Noise, clip, sampling and steps: all public."""
    microbatch: int
    """Records per forward and backward pass. It changes memory and speed only."""
    training: VisitSettings
    """Optimizer, schedule, proximal term and forward pass. Gradients are clipped by unit, so
    `max_grad_norm` is not read, and `accumulation_steps` is not either."""


def train_private_visit(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    units: Sequence[Unit],
    settings: PrivateSettings,
    pad_token_id: int,
    coins: Coins,
) -> float | None:
    """Train an adapter in place by DP-SGD; return its mean training loss if the mechanism tells it.

    Each step draws every unit with probability q, and releases

        ( sum_u clip_C(g_u) + N(0, (sigma C)^2) ) / (q N),    g_u = sum_r grad mean_t -log p(t)

    over the drawn units u, the records r of a unit, and the answer tokens t of a record. N is the
    declared number of units. FedProx's term, AdamW and its weight decay work on what was released.
    A told loss is the mean of the steps' (`released_loss`).

    Parameters
    ----------
    model
        As for `train_visit`.
    parameters
        The trained LoRA factors; their values on entry are w_round.
    units
        All units that may train.
    coins
        Secret; whoever knows them can take the noise off.

    Raises
    ------
    ModelError
        If the base or the adapter is one whose gradients cannot be told apart by unit.
    """
    mechanism, how = settings.mechanism, settings.training
    received = [p.detach().clone() for p in parameters]
    epsilon = max(how.adam_epsilon, LEAST_ADAM_EPSILON)
    optimizer = training.make_optimizer(parameters, dataclasses.replace(how, adam_epsilon=epsilon))
    optimizer.zero_grad(set_to_none=True)
    model.train()
    told: list[float] = []
    with per_unit(model, parameters, settings.microbatch) as collected:
        sums = FlatSums(parameters)
        for step in range(mechanism.steps):
            training.set_learning_rate(optimizer, how.schedule.rate(step, mechanism.steps))
            drawn = drawn_units(len(units), mechanism.sampling_rate, coins)
            losses = UnitLosses([len(units[u]) for u in drawn])
            for batch in microbatches([units[u] for u in drawn], settings.microbatch):
                losses.add(batch, add_batch(model, batch, collected, settings, pad_token_id))
                add_clipped_units(sums.each, collected, batch, mechanism.clipping_norm)
            if mechanism.tells_loss:
                told.append(released_loss(losses.means, mechanism, coins))
            gradients = sums.like(released(sums.flat, mechanism, coins))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            del gradients, gradient  # float64, and of no more use
            sums.flat.zero_()
            training.add_proximal_gradient(parameters, received, how.proximal_mu)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.step(step + 1, mechanism.steps)
    return min(max(sum(told) / len(told), 0.0), LARGEST_LOSS) if told else None


class UnitLosses:
    """The mean loss of each unit that a step has drawn, over its records."""

    def __init__(self, records: Sequence[int]) -> None:
        self._records = torch.tensor(records, dtype=torch.float64)
        self._sums = torch.zeros(len(records), dtype=torch.float64)

    def add(self, batch: Microbatch, means: torch.Tensor) -> None:
        """Add the mean losses of a microbatch's records."""
        self._sums.index_add_(0, torch.tensor(batch.units), means.double().cpu())

    @property
    def means(self) -> torch.Tensor:
        """float64 of (drawn units), in nats per answer token."""
        return self._sums / self._records


class FlatSums:
    """The sums of clipped gradients in one float64 vector, so that its noise is drawn at once."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._shapes = [parameter.shape for parameter in parameters]
        count, device = sum(map(math.prod, self._shapes)), parameters[0].device
        self.flat = torch.zeros(count, dtype=torch.float64, device=device)
        self.each = self.like(self.flat)

    def like(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a vector as views in the parameters' shapes."""
        parts = torch.split(flat, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


@dataclass(frozen=True)
class Microbatch:
    """Records that go through the model together; a unit's may be spread over several."""

    records: tuple[TokenizedExample, ...]
    units: tuple[int, ...]
    """Position of each record's unit among the drawn ones."""
    slots: tuple[int, ...]
    """Slot of each record's unit, in ascending order. Slot 0 goes on with the last batch's unit if
    that was not complete."""
    is_complete: bool
    """Whether the last unit has no more records in the next microbatch."""


def microbatches(units: Sequence[Unit], size: int) -> Iterator[Microbatch]:
    """Yield the records of units, unit by unit, in microbatches of at most `size` records."""
    records = [(number, record) for number, unit in enumerate(units) for record in unit]
    for start in range(0, len(records), size):
        part, after = records[start : start + size], records[start + size : start + size + 1]
        distinct = dict.fromkeys(number for number, _ in part)
        slot_of = {number: slot for slot, number in enumerate(distinct)}
        yield Microbatch(
            records=tuple(record for _, record in part),
            units=tuple(number for number, _ in part),
            slots=tuple(slot_of[number] for number, _ in part),
            is_complete=not after or after[0][0] != part[-1][0],
        )


def add_batch(
    model: Any,
    batch: Microbatch,
    collected: UnitGradients,
    settings: PrivateSettings,
    pad_token_id: int,
) -> torch.Tensor:
    """Add the gradients of a microbatch's records to the slots of their units.

    Returns
    -------
    float32 of (records): the mean loss of each over its answer tokens.
    """
    # A tail would be a record of no unit.
    forward = dataclasses.replace(settings.training.forward, bucket_tokens=1)
    device = collected.parameters[0].device
    lengths = [len(record.input_ids) for record in batch.records]
    means = torch.zeros(len(batch.records), device=device)
    with attending(model, forward):
        with collected.of_batch(lengths, batch.slots, forward.padding_free):
            loss = answer_nll_sum(model, batch.records, pad_token_id, device, forward, means)
        loss.backward()  # type: ignore[no-untyped-call]
    collected.check()
    return means


@torch.no_grad()
def add_clipped_units(
    sums: Sequence[torch.Tensor],
    collected: UnitGradients,
    batch: Microbatch,
    clipping_norm: float,
) -> None:
    """Add the clipped gradients of a microbatch's complete units to the sums, and free their slots.

    The gradient of a unit that goes on in the next microbatch moves to slot 0.
    """
    last = batch.slots[-1]
    done = last + 1 if batch.is_complete else last
    if done:
        add_clipped(sums, [g[:done] for g in collected.gradients], clipping_norm)
    for gradient in collected.gradients:
        if not batch.is_complete and last:
            gradient[0] = gradient[last]
        gradient[0 if batch.is_complete else 1 : last + 1] = 0.0


@torch.no_grad()
def released(total: torch.Tensor, mechanism: Mechanism, coins: Coins) -> torch.Tensor:
    """Return the noised mean of a step: all that is ever seen of a sum of gradients.

    Parameters
    ----------
    total : float64 tensor
        Sum of clipped gradients.

    Returns
    -------
    float64 tensor of the same shape, in steps of 2**-20 clipping norms over the expected batch.
    """
    spacing = mechanism.clipping_norm * GRID
    noise = coins.normals(total.numel(), total.device).view(total.shape)
    noise.mul_(mechanism.noise_multiplier * mechanism.clipping_norm)
    return noise.add_(total).div_(spacing).round_().mul_(spacing).div_(mechanism.expected_batch)


def released_loss(means: torch.Tensor, mechanism: Mechanism, coins: Coins) -> float:
    """Return the noised mean loss of a step, in nats per answer token.

    Each drawn unit adds its loss, from 0 to `LARGEST_LOSS`, less the middle m of these; noise is
    added to the sum, which is divided by the declared number of units that a step expects:

        m + ( sum_u clip(l_u, 0, 2 m) - m + N(0, (k sigma m)^2) ) / (q N),    k = `LOSS_NOISE`.

    One unit changes the sum by at most m. A loss that is not finite counts as the middle.

    Parameters
    ----------
    means : float64 tensor of (drawn units)
    """
    middle = LARGEST_LOSS / 2
    total = (means.nan_to_num(middle, middle, middle).clamp(0.0, LARGEST_LOSS) - middle).sum()
    deviation = LOSS_NOISE * mechanism.noise_multiplier * middle
    noised = total + deviation * coins.normals(1, torch.device("cpu"))[0]
    spacing = middle * GRID
    return middle + float((noised / spacing).round() * spacing) / mechanism.expected_batch
