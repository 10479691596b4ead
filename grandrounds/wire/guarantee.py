"""What a site tells of its guarantee: the numbers of the mechanism and the ε spent, never data.

A site in its own custody enforces them. In process and in simulation server and sites share a
process, so there they are a rehearsal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADJACENCY = "add or remove one unit"
"""Neighbouring data sets of the guarantee."""

REHEARSAL = "a rehearsal, since server and sites share a process"
"""What a private run in process or in simulation is worth."""

LOSS_DEVIATION = "train-loss-deviation"
"""Standard deviation in nats of the noise on a visit's training loss; missing if none is told."""

UNIT = "unit"
"""What a site hides: `record` or `patient`."""

RECORD, PATIENT = "record", "patient"

NOISE_MULTIPLIER = "noise-multiplier"
CLIPPING_NORM, SAMPLING_RATE, DELTA = "clipping-norm", "sampling-rate", "delta"
DECLARED_UNITS = "declared-units"
VISIT_STEPS = "visit-steps"
MOST_VISITS = "most-visits"
"""Visits of the run that the site answers at most."""

EPSILON = "epsilon"
"""ε of the run's visits so far, in an introduction and in a reply to `train`."""

EPSILON_FELL = "epsilon-fell"
"""Key of sites.json: a smaller ε that a site told after a larger one, which stays under `epsilon`.
Its budget was restored from a backup."""

BUDGET_SPENT = "budget-spent"
"""Key of sites.json: true once the site's budget is spent."""

VISITS_LEFT = "visits-left"
"""Metric of a reply to `train`: visits of the run that the site still answers."""

RESERVED_EPSILON = "reserved-epsilon"
"""ε of all `most-visits`: the guarantee, whichever of them the server asks for."""

ACCOUNTANT = "accountant"
"""Library, version and method that computed ε."""

NUMBERS = (
    *(NOISE_MULTIPLIER, CLIPPING_NORM, SAMPLING_RATE, DELTA, EPSILON, RESERVED_EPSILON),
    *(DECLARED_UNITS, VISIT_STEPS, MOST_VISITS, LOSS_DEVIATION),
)
GUARANTEE = (UNIT, *NUMBERS, ACCOUNTANT)
"""Facts of the introduction of a site whose visits are private."""


def is_private(introduction: Mapping[str, Any]) -> bool:
    """Whether a site's visits train by DP-SGD."""
    return NOISE_MULTIPLIER in introduction
