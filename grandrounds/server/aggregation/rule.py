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
    """How a round's client updates become the next adapter; one instance serves a whole run.

    A result does not depend on the order in which updates were added.
    """

    @abstractmethod
    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round (from 1) with the server's adapter as it is before it."""

    @abstractmethod
    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's update.

        Parameters
        ----------
        partition : int
            The site; each adds once in a round.
        received : mapping of str to float32 array
            What the site started from, which may be of lower rank than the server's adapter.
        change : mapping of str to float32 array
            Its tensors after training minus those received; only the trained names.
        weight : int
            Its number of training examples, at least 1.
        """

    @abstractmethod
    def result(self) -> Adapter:
        """Return the next adapter: all names, float32; call it once a round.

        Raises
        ------
        ValueError
            If nothing was added.
        RoundError
            If fewer sites replied than the rule needs.
        """

    def report(self) -> dict[str, float]:
        """Return figures of the last result, for the round's metrics."""
        return {}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what must survive a resume; `{}` if a round needs nothing of the one before."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Take over the `state()` of an earlier instance."""
