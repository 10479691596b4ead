"""Who trains in a round, which examples a visit sees, and where its random numbers come from.

Everything is a function of the seed and of round, partition and cursor, which all engines know.
Node ids, which Flower draws at random, play no part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from grandrounds.config.keys import Config, rounded_up, share_of
from grandrounds.config.schedules import total_at

BLUR = 0.1
"""Relative blur of lengths in length-grouped batches. On WikiDoc patient information (batch 16, at
most 512 tokens) the share of padding is 49 % ungrouped, 12 % sorted strictly, 15 % with it."""

_COHORT, _VISIT, _ORDER, _EVALUATION, _ADAPTER, _UPLINK, _DOWNLINK = range(7)


def _generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *numbers])


def training_cohort(
    seed: int, round_number: int, num_partitions: int, size: int, balanced: bool
) -> list[int]:
    """Return `size` distinct partition ids for a round, in ascending order.

    Parameters
    ----------
    balanced : bool
        Whether all sites take part once, in a seeded random order, before any does again;
        otherwise each cohort is drawn uniformly and independently.
    """
    if balanced:
        rounds = balanced_cohorts(seed, num_partitions, size)
        return next(itertools.islice(rounds, round_number - 1, None))
    drawn = _generator(seed, _COHORT, round_number).choice(num_partitions, size, replace=False)
    return sorted(int(p) for p in drawn)


def balanced_cohorts(seed: int, num_partitions: int, size: int) -> Iterator[list[int]]:
    """Yield the cohorts of rounds 1, 2, ...: every site once per pass, in a new order each pass.

    A cohort that spans two passes is filled from the next one, with sites not yet in it.
    """
    waiting: list[int] = []
    turns = itertools.count()
    while True:
        cohort, waiting = waiting[:size], waiting[size:]
        if len(cohort) < size:
            order = _generator(seed, _COHORT, 0, next(turns)).permutation(num_partitions).tolist()
            taken = set(cohort)
            fresh = [p for p in order if p not in taken][: size - len(cohort)]
            taken = set(fresh)
            waiting = [p for p in order if p not in taken]
            cohort += fresh
        yield sorted(cohort)


def evaluation_cohort(seed: int, num_partitions: int, size: int) -> list[int]:
    """Return the partition ids that evaluate the held-out loss.

    The cohort is the same in all rounds, so that their losses cover the same examples.
    """
    drawn = _generator(seed, _EVALUATION).choice(num_partitions, size, replace=False)
    return sorted(int(p) for p in drawn)


def cohort_of(config: Config, round_number: int) -> list[int]:
    """Return the training cohort of a round."""
    return training_cohort(
        config.federation.seed,
        round_number,
        config.data.num_partitions,
        config.cohort_size,
        config.strategy.cohorts == "balanced",
    )


@lru_cache(maxsize=8)
def cohorts_of(config: Config) -> tuple[tuple[int, ...], ...]:
    """Return the training cohorts of all rounds."""
    rounds = config.federation.num_server_rounds
    if config.strategy.cohorts != "balanced":
        return tuple(tuple(cohort_of(config, number)) for number in range(1, rounds + 1))
    seed, sites = config.federation.seed, config.data.num_partitions
    drawn = balanced_cohorts(seed, sites, config.cohort_size)
    return tuple(tuple(next(drawn)) for _ in range(rounds))


def visits_at_most(config: Config, rounds: int) -> int:
    """Return how often the first rounds of a run may train at one and the same site.

    Every pass of `balanced` cohorts has each site once, and `uniform` ones may have a site in every
    round. The server knows the seed that draws them, and draws them: no chance is counted upon.
    """
    if config.strategy.cohorts != "balanced":
        return rounds
    return math.ceil(rounds * config.cohort_size / config.data.num_partitions)


def evaluation_cohort_of(config: Config) -> list[int]:
    """Return the cohort that evaluates the held-out loss."""
    sites = config.data.num_partitions
    size = share_of(config.strategy.fraction_evaluate, sites)
    return evaluation_cohort(config.federation.seed, sites, size)


def visit_seed(seed: int, round_number: int, partition_id: int) -> int:
    """Return the seed of one visit's random numbers, in [0, 2**63)."""
    return int(_generator(seed, _VISIT, round_number, partition_id).integers(2**63))


def visit_generator(seed: int, round_number: int, partition_id: int) -> np.random.Generator:
    """Return the generator that orders the batches of one visit."""
    return np.random.default_rng(visit_seed(seed, round_number, partition_id))


def adapter_generator(seed: int, *round_number: int) -> np.random.Generator:
    """Return the generator of the initial adapter, or of a round's fresh one (`flora`)."""
    return _generator(seed, _ADAPTER, *round_number)


def uplink_generator(seed: int, round_number: int, partition_id: int) -> np.random.Generator:
    """Return the generator of stochastic rounding at a site."""
    return _generator(seed, _UPLINK, round_number, partition_id)


def downlink_generator(seed: int, *message: int) -> np.random.Generator:
    """Return the generator of stochastic rounding of one of the server's messages."""
    return _generator(seed, _DOWNLINK, *message)


def examples_per_visit(
    max_steps: int, num_train_epochs: float, examples_per_step: int, num_examples: int
) -> int:
    """Return the number of examples in one visit, counting repeats."""
    if max_steps > 0:
        return max_steps * examples_per_step
    return max(1, rounded_up(num_train_epochs, num_examples))


def examples_of_a_visit(config: Config, num_examples: int) -> int:
    """Return how many examples a visit to a site with `num_examples` takes in a configured run."""
    steps, epochs = config.arguments.max_steps, config.arguments.num_train_epochs
    return examples_per_visit(steps, epochs, config.examples_per_step, num_examples)


def next_examples(
    seed: int, partition_id: int, num_examples: int, cursor: int, count: int
) -> list[int]:
    """Return the indices of a site's next `count` examples.

    A site goes through a seeded permutation of its examples, a new one each epoch: no example is
    repeated before all others have been seen.

    Parameters
    ----------
    cursor : int
        Number of examples given to the site since the start of the run.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(cursor + len(indices), num_examples)
        order = _generator(seed, _ORDER, partition_id, epoch).permutation(num_examples)
        indices += [int(i) for i in order[offset : offset + count - len(indices)]]
    return indices


def length_grouped_batches(
    lengths: list[int], batch_size: int, generator: np.random.Generator
) -> list[list[int]]:
    """Group examples of similar length into batches, and shuffle the batches.

    Parameters
    ----------
    lengths : list of int
        Tokens of each example of the visit. Grouping changes which examples share a batch,
        not which are sampled. Lengths are blurred by `BLUR` to keep batches mixed: sorted strictly,
        questions of one kind would end up in one batch.

    Returns
    -------
    list of list of int
        Indices into `lengths`, each once. Only the last group may be smaller than `batch_size`; it
        is shuffled like the others.
    """
    blurred = np.array(lengths) * generator.uniform(1 - BLUR, 1 + BLUR, len(lengths))
    by_length = [int(i) for i in np.argsort(blurred, kind="stable")]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[int(i)] for i in generator.permutation(len(batches))]


def round_learning_rate_of(config: Config, round_number: int) -> float:
    """Return the configured learning rate of a round, by the schedule that it follows."""
    train = config.train
    return round_learning_rate(
        round_number,
        total_at(*config.federation.length, round_number),
        train.learning_rate_max,
        train.learning_rate_min,
    )


def round_learning_rate(
    round_number: int, num_rounds: int, maximum: float, minimum: float
) -> float:
    """Return the learning rate of a round by cosine annealing.

    lr(r) = min + (max - min)(1 + cos(pi r / R)) / 2 for r = 1 ... R, as in FlowerTune: the last
    round has exactly `minimum`, the first nearly `maximum`. Loshchilov and Hutter, SGDR
    (2017), equation 5, without restarts.
    """
    cosine = math.cos(math.pi * round_number / num_rounds)
    return minimum + 0.5 * (maximum - minimum) * (1.0 + cosine)


@dataclass(frozen=True)
class VisitSchedule:
    """The learning rate within a visit: it rises to the round's and stays there, or falls."""

    peak: float
    """The round's learning rate."""
    warmup_steps: int
    """Steps until `peak` is reached."""
    decay: str = "constant"
    """A value of `lr-scheduler-type`."""

    def rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of optimizer step `step` = 0, 1, ... of `num_steps`.

        It rises linearly to `peak` at step `warmup_steps`. The first step has
        `peak / (warmup_steps + 1)`, not 0 as in Hugging Face's schedules, so that no step is
        wasted. From there `linear` and `cosine` fall towards 0, which would be reached one step
        after the last, as in Hugging Face's schedules of these names.
        """
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / (self.warmup_steps + 1))
        passed = (step - self.warmup_steps) / (num_steps - self.warmup_steps)
        if self.decay == "linear":
            return self.peak * (1.0 - passed)
        if self.decay == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * passed))
        return self.peak
