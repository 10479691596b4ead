"""What an aggregation rule is to the round loop, and what a rule may be told.

A new rule is one file in this folder with `make(settings: RuleSettings) -> Rule`. In the formulas
of the rules, w is the server's adapter, d_i what site i changed, n_i its number of training
examples, n = sum_i n_i and p_i = n_i / n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from grandrounds.wire.adapter import Adapter


class Rule(Protocol):
    """How a round's replies become the next adapter; one instance serves a whole run.

    A result does not depend on the order in which replies were added.
    """

    def begin(self, round_number: int, adapter: Adapter) -> None:
        """Start a round (from 1) with the server's adapter as it is before it."""

    def add(self, partition: int, received: Adapter, change: Adapter, weight: int) -> None:
        """Add one site's reply.

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
        """Return numbers about the last result, for the round's metrics."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what must survive a resume; `{}` if nothing."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the `state()` of an earlier instance."""


@dataclass(frozen=True)
class RuleSettings:
    """What the rules may be told; each reads what concerns it."""

    name: str
    """The rule's file in this folder."""
    rank: int
    """r of the adapter that a site trains."""
    max_rank: int
    """flora: the rank at which the growing adapter is cut."""
    num_malicious_nodes: int
    """krum, multikrum, bulyan: f, the replies of a round that may be hostile."""
    num_nodes_to_select: int
    """multikrum: m, the replies that are averaged."""
    trimmed_share: float
    """fedtrimmedavg: beta, the share of replies cut off at either end, below 0.5."""
    server_learning_rate: float
    """fedavgm, fedadam, fedyogi, fedadagrad: eta; 0: the rule's usual value."""
    server_momentum: float
    """fedavgm: beta."""
    beta_1: float
    """fedadam, fedyogi: decay of the first moment."""
    beta_2: float
    """fedadam, fedyogi: decay of the second moment."""
    tau: float
    """fedadam, fedyogi, fedadagrad: degree of adaptivity, above 0."""
