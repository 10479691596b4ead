"""The Poisson-subsampled Gaussian mechanism of private visits, as numbers that hold no data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grandrounds.config.keys import Config

LARGEST_LOSS = 5.0
"""A unit's loss counts from 0 to this, in nats per answer token."""

LOSS_NOISE = 5.0
"""Noise on the sum of losses over that on the sum of gradients, each in units of what one unit can
change: the larger, the less a told loss costs, and the less it says."""

BESIDE_LOSS = math.sqrt(1 + LOSS_NOISE**-2)
"""How much more noise the gradients need where the loss is told too, at the same ε: 1.0198."""


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD at a site (Abadi et al., 2016): every number is public and fixed before a run.

    A unit is a record or all records of one patient. Each step draws every unit with probability
    `sampling_rate`, clips each drawn unit's gradient to `clipping_norm`, sums, adds Gaussian noise
    of standard deviation `noise_multiplier * clipping_norm` to each coordinate, and divides by
    `expected_batch`. Neighbours differ by one unit that is added or removed.
    """

    noise_multiplier: float
    """Standard deviation of the noise in units of the clipping norm; above 0."""
    clipping_norm: float
    """L2 norm to which a unit's gradient is clipped, over all trained tensors; above 0."""
    sampling_rate: float
    """Probability with which a step draws a unit; above 0, at most 1."""
    declared_units: int
    """Number of units that the site declares. It is public, and not counted from the data."""
    steps: int
    """Steps of one visit."""
    visits: int
    """Most visits of the run to this site."""
    delta: float
    """Probability with which the guarantee may fail."""
    tells_loss: bool = False
    """Whether each step also releases the sum of its units' losses, with noise of its own."""

    @property
    def expected_batch(self) -> float:
        """Units of a step, in expectation: what the sum of gradients is divided by."""
        return self.sampling_rate * self.declared_units

    @property
    def all_steps(self) -> int:
        """Steps of all visits."""
        return self.steps * self.visits

    @property
    def joint_noise_multiplier(self) -> float:
        """Noise multiplier of the one Gaussian mechanism that a step is, with all that it releases.

        Gradients with noise sigma and losses with noise k sigma, each in units of what one unit can
        change, hide as much as one release with sigma / sqrt(1 + 1 / k^2) (Dong, Roth and Su,
        Gaussian differential privacy, 2022, section 3).
        """
        return self.noise_multiplier / (BESIDE_LOSS if self.tells_loss else 1.0)

    @property
    def loss_deviation(self) -> float:
        """Standard deviation of the noise on a visit's told loss, in nats per answer token."""
        step = LOSS_NOISE * self.noise_multiplier * LARGEST_LOSS / 2 / self.expected_batch
        return step / math.sqrt(self.steps)

    def noise_to_clip(self, num_values: int) -> float:
        """Return the expected L2 norm of a step's noise over the largest norm of its signal.

        Parameters
        ----------
        num_values : int
            Trained values of the adapter.
        """
        return self.noise_multiplier * math.sqrt(num_values) / self.expected_batch


def sampling_rate_of(config: Config, declared_units: int) -> float:
    """Return the probability with which a step draws a unit.

    With `privacy.sampling-rate = 0` the expected batch is the recipe's.
    """
    rate = config.privacy.sampling_rate or config.examples_per_step / declared_units
    return min(1.0, rate)
