"""Nesterov's momentum at the server, on the mean of the updates: the outer optimizer of DiLoCo.

    v_t = mu v_{t-1} + D_t,   D_t = sum_i p_i d_i
    w_next = w + eta (D_t + mu v_t)

Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models (2023),
algorithm 1, whose outer gradient is -D_t; Nesterov's step as PyTorch's SGD takes it. eta defaults
to 0.7 and mu to 0.9, those of the paper's experiments. With mu = 0 and eta = 1 it is the mean
itself. A factor that was not trained in a round does not move, and its v stays. v survives a
resume; besides the memory of the mean, the server stores this one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import StrategyConfig
from grandrounds.server.aggregation.fedavg import Average
from grandrounds.server.aggregation.rule import Rule
from grandrounds.wire.adapter import Adapter

VELOCITY = "velocity"
"""State carried from round to round, by tensor name."""


class Nesterov(Rule):
    """A rule that averages, followed by Nesterov's momentum.

    Parameters
    ----------
    average
        The mean of the updates.
    config
        The strategy's section: learning rate and momentum at the server.
    """

    def __init__(self, average: Average, config: StrategyConfig) -> None:
        self._average, self._rate = average, config.server_step
        self._momentum = config.server_momentum
        self._velocity: dict[str, NDArray[np.float32]] = {}

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round."""
        self._adapter = adapter
        self._average.begin(round_number, adapter)

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's change to the mean."""
        self._average.add(partition, received, change, weight)

    def result(self) -> Adapter:
        """Return the adapter after the step along mean and momentum."""
        moved = dict(self._adapter)
        for name, mean in self._average.mean().items():
            step = mean.astype(np.float64)
            velocity = step + self._momentum * self._velocity.get(name, np.float32(0))
            self._velocity[name] = velocity.astype(np.float32)
            step += self._momentum * self._velocity[name].astype(np.float64)
            moved[name] = (self._adapter[name] + self._rate * step).astype(np.float32)
        return moved

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the momentum, as `velocity/<tensor name>`."""
        return {f"{VELOCITY}/{name}": tensor for name, tensor in self._velocity.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the momentum of an earlier instance."""
        start = len(VELOCITY) + 1
        self._velocity = {name[start:]: np.array(tensor) for name, tensor in state.items()}
