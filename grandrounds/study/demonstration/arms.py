"""The arms of the rehearsal: one recipe on common and rare facts, without privacy and with.

Learning rate, clipping norm, steps and batch were chosen on this synthetic world, never on a
site's data. All arms share them: nothing differs but the guarantee.
"""

from __future__ import annotations

from dataclasses import dataclass

from grandrounds.config.values import Scalar
from grandrounds.data.common_and_rare import COMMON_AND_RARE
from grandrounds.data.common_and_rare.records import NUM_RECORDS

ROUNDS, STEPS, BATCH = 6, 25, 64
"""150 steps of 64 records, or of 64 in expectation."""

RECIPE: dict[str, Scalar] = {
    "num-server-rounds": ROUNDS,
    "model.name": "formulary",
    "model.lora.peft-lora-r": 8,
    "model.lora.peft-lora-alpha": 16.0,
    "model.lora.target-modules": "all-linear",
    "static.dataset.name": COMMON_AND_RARE,
    "data.partitioner": "iid",
    "data.num-partitions": 1,
    "data.held-out-fraction": 0.0,
    "data.prompt-template": "chat",
    "strategy.name": "ffa",
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 0.0,
    "train.learning-rate-max": 2e-2,
    "train.learning-rate-min": 1e-3,
    "train.num-threads": 1,
    "train.save-every-round": ROUNDS,
    "train.training-arguments.max-steps": STEPS,
    "train.training-arguments.per-device-train-batch-size": BATCH,
}
"""All records at one site, so that its batch is a small share of them: q = 64 / 1,905."""


@dataclass(frozen=True)
class Arm:
    """One run of the recipe."""

    name: str
    noise_multiplier: float = 0.0
    """0: without a guarantee."""

    @property
    def settings(self) -> dict[str, Scalar]:
        """The keys of the guarantee; a patient is the unit."""
        if not self.noise_multiplier:
            return {}
        return {
            "privacy.unit-guarantee": "example",
            "privacy.unit-column": "patient",
            "privacy.declared-units": NUM_RECORDS,
            "privacy.noise-multiplier": self.noise_multiplier,
            "privacy.clipping-norm": 1.0,
        }


ARMS = (Arm("none"), Arm("8", 0.6486), Arm("4", 0.8542), Arm("1", 1.8107))
"""Noise multipliers at which `accountant.calibrated` reaches ε = 8, 4 and 1 with this recipe and
delta = 1e-5; the ε that is shown is computed by the run itself."""
