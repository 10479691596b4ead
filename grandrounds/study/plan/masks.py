"""What masks change about a run, in words: the choice, the range of values, what is still told."""

from __future__ import annotations

import math
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.masked import EACH_RULE, PRODUCT_RULES
from grandrounds.config.words import counted
from grandrounds.server.masks.told import BETA, still_told
from grandrounds.wire.masks.attempt import threshold
from grandrounds.wire.masks.fixed_point import (
    BITS,
    RANGE_STEPS,
    SURE_STEPS,
    largest_change,
    numbers_of,
)
from grandrounds.wire.schedule import round_learning_rate_of


def notes(config: Config) -> list[str]:
    """Return what masks change about a run; empty without masks."""
    if not config.is_masked:
        return []
    return [
        f"{BETA}: in process and in simulation a rehearsal, since one machine holds all keys; "
        f"{may_be_lost(config.cohort_size)}",
        choice(),
        values_text(config),
        *coarseness(config),
        f"what the server still gets of each site: {still_told(config)}",
    ]


def as_dict(config: Config) -> dict[str, Any]:
    """Return the same for JSON."""
    return {
        "codec": config.federation.secure_aggregation,
        "sites-that-may-be-lost": config.cohort_size - threshold(config.cohort_size),
        "range-in-round-1": range_of_round_1(config),
        "step-in-round-1": step_of_round_1(config),
        "values-may-be-cut": bool(leaves_range(config)),
        "still-told": still_told(config),
    }


def may_be_lost(cohort: int) -> str:
    """Return how many sites of a cohort a masked sum can do without."""
    spare = cohort - threshold(cohort)
    lost = counted(spare, "site") if spare else "no site"
    return (
        f"{lost} of {cohort} may be lost in a round, and at a real site not more than its "
        "min-cohort leaves (5 in the template of site.toml)"
    )


def choice() -> str:
    """Return what cannot be had beside masks, and why."""
    return (
        f"masks or robust rules is a choice: {', '.join(EACH_RULE)}, norm bounds and screens "
        "(defence.) need each site's update, which the server does not have under masks, so that "
        f"a site can send any numbers. Refused too: {', '.join(PRODUCT_RULES)}, since the "
        "product of two factors cannot be summed masked; uplink codecs, since masked vectors have "
        "one of their own; incremental downlink, since masks are bound to one message for all"
    )


def values_text(config: Config) -> str:
    """Return the range of a value, and whether values beyond it are to be cut."""
    bits, largest = BITS[config.federation.secure_aggregation], range_of_round_1(config)
    said = (
        f"masked values are integers of {bits} bits in a range of ±{largest:.3g} in round 1, "
        f"{RANGE_STEPS:g} learning rates a step"
    )
    if why := leaves_range(config):
        return (
            f"{said}: {why} a value may leave it; sites cut such values, and their count travels "
            "in the mask (values-cut)"
        )
    return f"{said}: AdamW without weight decay stays inside, and no value is cut"


def coarseness(config: Config) -> list[str]:
    """Return to what `masked16` rounds a value; empty for `masked32`, which rounds little."""
    if config.federation.secure_aggregation != "masked16":
        return []
    step = step_of_round_1(config)
    return [
        f"masked16 rounds values at random, unbiased, to multiples of {step:.2g} in round 1, "
        f"{step / range_of_round_1(config):.2g} of the range, at the site of the largest weight, "
        "and coarser at the others; steps of masked32 are 65,536 times finer"
    ]


def range_of_round_1(config: Config) -> float:
    """Return the largest value of a change in round 1, the widest range of the run."""
    return largest_change(round_learning_rate_of(config, 1), config.arguments.max_steps)


def step_of_round_1(config: Config) -> float:
    """Return the resolution of a value in round 1, at the site of the largest weight."""
    numbers = numbers_of(config, round_learning_rate_of(config, 1), config.cohort_size, 1, 1)
    return math.ldexp(1.0, -numbers.fraction_bits)


def leaves_range(config: Config) -> str:
    """Return with what a value may leave the range; empty if none can."""
    arguments, optimizer = config.arguments, config.train.optimizer
    if arguments.weight_decay > 0:
        return "with weight decay"
    if optimizer != "adamw_torch":
        return f"with the 8-bit states of {optimizer}"
    if arguments.max_steps > SURE_STEPS:
        return f"in more than {SURE_STEPS} steps a visit"
    return ""
