"""What a comparison consists of: arms, the visits that each makes, and its units of work.

docs/compare.md says what the arms mean. A unit is what is finished, or not, when a comparison is
stopped: one federation, one pool, or one site alone, for one seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grandrounds.config.keys import Config
from grandrounds.config.values import words_of
from grandrounds.errors import ConfigError, nearest

BASE, FEDERATED, CENTRALISED, LOCAL, LEAVE_ONE_OUT = (
    "base",
    "federated",
    "centralised",
    "local",
    "leave-one-out",
)

ARMS = (FEDERATED, CENTRALISED, LOCAL, LEAVE_ONE_OUT)
"""What can be asked for; `base` is always judged beside them."""

FEDERATIONS = (FEDERATED, LEAVE_ONE_OUT)
"""The arms whose units are whole runs."""


@dataclass(frozen=True)
class Unit:
    """One finished or unfinished piece of a comparison."""

    arm: str
    """`base`, or one of `ARMS`."""
    seed: int
    """Its seed."""
    site: int | None = None
    """The site that is alone, or left out; None in the other arms."""

    @property
    def name(self) -> str:
        """Where it lies below `units` and `runs`: `local/seed-42/site-3`."""
        parts = [self.arm, f"seed-{self.seed}"]
        return "/".join(parts if self.site is None else [*parts, f"site-{self.site}"])

    @property
    def title(self) -> str:
        """What a person is told: `local, seed 42, site 3`."""
        site = "" if self.site is None else f", site {self.site}"
        return f"{self.arm}, seed {self.seed}{site}"


def check_arms(names: Sequence[str]) -> tuple[str, ...]:
    """Return the arms in the order of `ARMS`, each once.

    Raises
    ------
    ConfigError
        If there is none, or one is unknown; the message suggests the nearest.
    """
    for name in names:
        if name not in ARMS:
            hint = " It is always judged." if name == BASE else nearest(name, ARMS)
            raise ConfigError(f"there is no arm {name!r}; allowed: {', '.join(ARMS)}.{hint}")
    if not names:
        raise ConfigError(f"--arms names none; allowed: {', '.join(ARMS)}.")
    return tuple(arm for arm in ARMS if arm in names)


def check_seeds(first: int, count: int) -> list[int]:
    """Return `count` seeds from `first` on; raise `ConfigError` for a count below 1."""
    if count < 1:
        raise ConfigError(f"--seeds = {count}: at least 1 seed is needed, and 2 for intervals.")
    return list(range(first, first + count))


def check_sites(text: str, num_sites: int) -> list[int]:
    """Return the sites that `all`, `3` or `0,3,5` names.

    Raises
    ------
    ConfigError
        If one is no number, or there is no such site.
    """
    if text.strip() == "all":
        return list(range(num_sites))
    words = words_of(text)
    wrong = [w for w in words if not (w.isascii() and w.isdigit() and int(w) < num_sites)]
    if wrong or not words:
        raise ConfigError(
            f"--sites {text!r}: {wrong[0] if wrong else 'nothing'} is no site; allowed: all, or "
            f"numbers from 0 to {num_sites - 1} with commas."
        )
    return sorted({int(word) for word in words})


def units(
    arms: Sequence[str], seeds: Sequence[int], num_sites: int, left_out: Sequence[int]
) -> Iterator[Unit]:
    """Yield every unit, seed by seed, so that the first seed can be read soon."""
    for seed in seeds:
        yield Unit(BASE, seed)
        for arm in arms:
            if arm == LOCAL:
                yield from (Unit(arm, seed, site) for site in range(num_sites))
            elif arm == LEAVE_ONE_OUT:
                yield from (Unit(arm, seed, site) for site in left_out)
            else:
                yield Unit(arm, seed)


def check_leave_one_out(config: Config) -> None:
    """Raise `ConfigError` if nobody would be left."""
    if config.data.num_partitions < 2:
        raise ConfigError(
            "arm 'leave-one-out' needs at least 2 sites, and data.num-partitions = "
            f"{config.data.num_partitions}."
        )


# --- Visits ---------------------------------------------------------------------------------------


def visits_of_a_site(config: Config) -> float:
    """Return how many visits a site has in the federation, in the mean."""
    rounds = config.federation.num_server_rounds
    return rounds * config.cohort_size / config.data.num_partitions


def local_visits(config: Config, visit_examples: int) -> list[tuple[int, int]]:
    """Return (round whose learning rate holds, examples) of each visit of a site alone.

    The visits are those of the federation in the mean, in whole optimizer steps (whole examples,
    where visits are counted in epochs), and at least one step; visit v of V stands at round
    ceil((v - 1/2) R / V) of R.

    Parameters
    ----------
    visit_examples : int
        Examples of one visit to this site, repeats counted.
    """
    step = config.examples_per_step if config.arguments.max_steps > 0 else 1
    total = step * max(1, round(visits_of_a_site(config) * visit_examples / step))
    count = math.ceil(total / visit_examples)
    rounds = config.federation.num_server_rounds
    return [
        (
            min(rounds, math.ceil((visit + 0.5) * rounds / count)),
            min(visit_examples, total - visit * visit_examples),
        )
        for visit in range(count)
    ]
