"""The weight of each site in a round's average, limited so that no site outvotes the others.

A site's weight is at most the number of training examples in its admission, else the one that it
gave at its first roll call, and a multiple of its cohort's median. No such number can be verified.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from grandrounds.errors import ReplyError
from grandrounds.server.aggregation.weighted_mean import LARGEST_WEIGHT
from grandrounds.wire.messages import Metrics


def limited(examples: Mapping[int, int], largest: float) -> dict[int, int]:
    """Return the most that each site of a cohort may weigh.

    No weight exceeds `largest` times the (lower) median, and no share of the total exceeds
    `largest / (largest + n - 1)`, which is the share of a site of that size among n - 1 of the
    median's: 25 % for 2 and a cohort of seven, whatever the sizes of the others.

    Parameters
    ----------
    examples
        Site → number of training examples, at least 1, of the whole cohort.
    largest : float
        At least 1; 0: no limit.
    """
    if not largest or len(examples) < 2:
        return dict(examples)
    most = int(largest * statistics.median_low(examples.values()))
    weights = sorted(min(count, most) for count in examples.values())
    whole = largest + len(weights) - 1
    for top in range(1, len(weights)):  # the sites whose share the limit would cut
        if largest * top >= whole:
            break
        equal = largest * sum(weights[:-top]) / (whole - largest * top)
        if equal >= weights[-top - 1]:
            most = min(most, max(1, int(equal)))
            break
    return {site: min(count, most) for site, count in examples.items()}


def claimed_examples(metrics: Metrics, most: int) -> int:
    """Return a reply's weight: its num-examples, at most `most`.

    Raises
    ------
    ReplyError
        If it is not an integer of at least 1, or too large to be exact.
    """
    claim = metrics.get("num-examples")
    if not isinstance(claim, int) or claim < 1:
        raise ReplyError(f"num-examples is {claim!r}, not an integer of at least 1")
    weight = min(claim, most)
    if weight > LARGEST_WEIGHT:
        raise ReplyError(f"num-examples is {weight}, more than the {LARGEST_WEIGHT} allowed")
    return weight
