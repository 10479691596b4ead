"""The base class of aggregation rules.

A rule is one file in this folder with `make(config: StrategyConfig) -> Rule`, and one row in
`config/strategies.py`. In the formulas of the rules, w is the server's adapter, d_i the change of
site i, n_i its number of training examples, n = sum_i n_i and p_i = n_i / n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from grandrounds.wire.adapter import Adapter


class Rule(ABC):
    """Aggregates a round's client updates into the next adapter; one instance serves a run.

    Results do not depend on the order in which updates are added.
    """

    @abstractmethod
    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round (from 1) with the server's current adapter."""

    @abstractmethod
    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's update.

        Parameters
        ----------
        partition : int
            The site, which adds one update per round.
        received : mapping of str to float32 array
            The tensors from which the site started, possibly of lower rank than the server's.
        change : mapping of str to float32 array
            Its trained tensors minus the received ones; only the trained names.
        weight : int
            Its number of training examples, at least 1.
        """

    @abstractmethod
    def result(self) -> Adapter:
        """Return the next adapter, with all names, in float32; called once per round.

        Raises
        ------
        ValueError
            If no update was added.
        RoundError
            If the rule needs more replies.
        """

    def report(self) -> dict[str, float]:
        """Return the figures of the last result, for the round's metrics."""
        return {}

    def ranks(self) -> dict[int, int]:
        """Return the ranks of the sites, by partition, that the rule has lowered for good."""
        return {}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state that a resume restores; `{}` for a stateless rule."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Restore the `state()` of an earlier instance."""
