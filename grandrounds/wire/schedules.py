"""The learning rate of a round, and of a step within a visit."""

from __future__ import annotations

import math


def round_learning_rate(
    round_number: int, num_rounds: int, maximum: float, minimum: float
) -> float:
    """Return the learning rate of a round by cosine annealing.

    lr(r) = min + (max - min)(1 + cos(pi r / R)) / 2 for r = 1 ... R, as FlowerTune counts: the
    last round has exactly `minimum`, the first one nearly `maximum`. Loshchilov and Hutter, SGDR
    (2017), equation 5, without restarts.
    """
    cosine = math.cos(math.pi * round_number / num_rounds)
    return minimum + 0.5 * (maximum - minimum) * (1.0 + cosine)


def step_learning_rate(step: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of optimizer step `step` = 0, 1, ... of a visit.

    Rises by equal parts and stays at `peak` from step `warmup_steps` on. The first step has
    `peak / (warmup_steps + 1)`, not 0 as in Hugging Face's schedule: of six steps none is idle.
    """
    return peak * min(1.0, (step + 1) / (warmup_steps + 1))
