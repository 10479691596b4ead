"""The Poisson-subsampled Gaussian mechanism of private visits, as numbers that hold no data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grandrounds.config.keys import Config


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

    @property
    def expected_batch(self) -> float:
        """Units of a step, in expectation: what the sum of gradients is divided by."""
        return self.sampling_rate * self.declared_units

    @property
    def all_steps(self) -> int:
        """Steps of all visits."""
        return self.steps * self.visits

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
