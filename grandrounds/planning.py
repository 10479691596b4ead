"""What a run will send, known before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grandrounds.adapter import Shapes
from grandrounds.ledger import MIB, message_bytes


@dataclass(frozen=True)
class Plan:
    """The traffic of a run in which nothing fails."""

    adapter_parameters: int
    """Numbers in the adapter."""
    message_bytes: int
    """Bytes of one message that carries an adapter, npy headers included."""
    train_messages: int
    """Messages of training rounds with tensors, both directions."""
    evaluate_messages: int
    """Messages with tensors for held-out loss: down only."""
    formulary_messages: int
    """Messages with tensors for the formulary's questions: one, down, at the end."""
    rounds: int
    """Rounds of training."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run by FlowerTune's counting rule."""
        count = self.train_messages + self.evaluate_messages + self.formulary_messages
        return count * self.message_bytes

    @property
    def mib_per_round(self) -> float:
        """MiB of one training round with its evaluation."""
        return self.total_bytes / self.rounds / MIB

    def as_dict(self) -> dict[str, float | int]:
        """Return the plan for JSON and for display."""
        return {
            "adapter-parameters": self.adapter_parameters,
            "message-mib": self.message_bytes / MIB,
            "mib-per-round": self.mib_per_round,
            "total-mib": self.total_bytes / MIB,
            "total-bytes": self.total_bytes,
        }


def plan_run(
    shapes: Shapes,
    *,
    rounds: int,
    cohort: int,
    evaluation_cohort: int,
    formulary: bool,
) -> Plan:
    """Return the traffic of a run.

    Parameters
    ----------
    shapes
        The adapter's float32 tensors.
    cohort, evaluation_cohort : int
        Sites that train, and that answer held-out loss, in a round. Held-out loss is also asked
        once before the first round.
    formulary : bool
        Whether the formulary's questions are asked at the end.
    """
    return Plan(
        adapter_parameters=sum(math.prod(shape) for shape in shapes.values()),
        message_bytes=message_bytes(shapes),
        train_messages=2 * rounds * cohort,
        evaluate_messages=(rounds + 1) * evaluation_cohort,
        formulary_messages=int(formulary),
        rounds=rounds,
    )
