"""FedAvg: the weighted mean of the changes, with LoRA factors averaged separately.

    w_next = w + sum_i p_i d_i

McMahan et al. (2017), algorithm 1. Sites are weighted by their number of examples, and one
hostile site can move the mean anywhere. Memory is that of `WeightedMean`, whatever the cohort.
"""

from __future__ import annotations

import numpy as np

from grandrounds.config.keys import StrategyConfig
from grandrounds.config.strategies import STRATEGIES
from grandrounds.server.aggregation.replies import check_shapes
from grandrounds.server.aggregation.rule import Rule
from grandrounds.server.aggregation.weighted_mean import WeightedMean
from grandrounds.wire.adapter import Adapter, of_factors, shapes_of


def make(config: StrategyConfig) -> Rule:
    """Return the rule."""
    return Average(config.name)


class Average(Rule):
    """The weighted mean of the changes of the tensors trained in a round; the others stay."""

    def __init__(self, name: str) -> None:
        self._asks = STRATEGIES[name]

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round."""
        self._adapter = adapter
        shapes = of_factors(shapes_of(adapter), self._asks.trained(round_number))
        self._mean = WeightedMean(shapes)
        self._names = set(shapes)

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's change to the sum, without keeping the reply."""
        if change.keys() != self._names:
            extra = sorted(change.keys() - self._names)
            missing = sorted(self._names - change.keys())
            raise ValueError(
                f"partition {partition} did not change the tensors trained in this round: "
                f"missing {missing[:2]}, unexpected {extra[:2]}"
            )
        check_shapes(change, self._adapter)
        self._mean.add(change, weight)

    def result(self) -> Adapter:
        """Return the adapter with the mean of the changes added."""
        start = {name: self._adapter[name] for name in self._adapter if name in self._names}
        return {**self._adapter, **self._mean.result(start)}

    def mean(self) -> Adapter:
        """Return the weighted mean of the changes alone, float32."""
        zeros = {n: np.zeros_like(self._adapter[n]) for n in self._adapter if n in self._names}
        return self._mean.result(zeros)
