"""How many examples each arm visits: together as many as the federation, to the example.

`each` is, for every site, the examples of one visit to it, repeats included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError
from grandrounds.wire.schedule import cohort_of

Visits = list[tuple[int, int]]
"""(round that sets the learning rate, examples) of each visit."""


def pooled_visits(config: Config, each: Sequence[int]) -> Visits:
    """Return the visits to one pool of all data: each round as many examples as its cohort sees."""
    rounds = range(1, config.federation.num_server_rounds + 1)
    return [(number, sum(each[k] for k in cohort_of(config, number))) for number in rounds]


def local_examples(config: Config, each: Sequence[int]) -> list[int]:
    """Return the examples that each site alone visits, at least 1.

    The federation's examples are divided in proportion to a visit to each site. Shares are rounded
    on their running sum, so that together they are exactly as many.
    """
    total = sum(count for _, count in pooled_visits(config, each))
    ends = [total * upto // sum(each) for upto in accumulate(each, initial=0)]
    return [max(1, end - start) for start, end in pairwise(ends)]


def local_visits(config: Config, total: int, visit_examples: int) -> Visits:
    """Return the visits to a site alone; the last one, and its last step, may be shorter.

    Visit v of V uses the learning rate of round ceil((v - 1/2) R / V) of R.

    Parameters
    ----------
    total : int
        Examples of all visits together, from `local_examples`.
    visit_examples : int
        Examples of one visit to this site.
    """
    count = math.ceil(total / visit_examples)
    rounds = config.federation.num_server_rounds
    return [
        (
            min(rounds, math.ceil((visit + 0.5) * rounds / count)),
            min(visit_examples, total - visit * visit_examples),
        )
        for visit in range(count)
    ]


def rounds_before(config: Config, each: Sequence[int]) -> int:
    """Return the rounds after which personal adapters come out of the federation's example visits.

    The most rounds whose visits make, with `personalisation.steps` at every site, no more example
    visits than all rounds of the recipe.

    Raises
    ------
    ConfigError
        If that leaves no round.
    """
    counts = [count for _, count in pooled_visits(config, each)]
    tails = config.personalisation.steps * config.examples_per_step * len(each)
    left = sum(counts) - tails
    rounds = sum(end <= left for end in accumulate(counts))
    if not rounds:
        most = (sum(counts) - counts[0]) // (config.examples_per_step * len(each))
        raise ConfigError(
            f"personalisation.steps = {config.personalisation.steps} at {len(each)} sites make "
            f"{tails:,} example visits, the {len(counts)} rounds of the federation "
            f"{sum(counts):,}: --equal-visits would leave no round. "
            + (f"Set at most {most}." if most else "Raise num-server-rounds.")
        )
    return rounds


def visits_of_a_site(config: Config) -> float:
    """Return the mean number of visits to a site in the federation."""
    rounds = config.federation.num_server_rounds
    return rounds * config.cohort_size / config.data.num_partitions


def entry(config: Config, each: Sequence[int]) -> dict[str, Any]:
    """Return `budget` of comparison.json: visits, and the rounds whose rates site 0 alone uses."""
    rounds, cohort = config.federation.num_server_rounds, config.cohort_size
    first = local_visits(config, local_examples(config, each)[0], each[0])
    return {
        "rounds": rounds,
        "cohort": cohort,
        "sites": config.data.num_partitions,
        "site-visits": rounds * cohort,
        "local-visits": visits_of_a_site(config),
        "local-rounds": [number for number, _ in first],
    }
