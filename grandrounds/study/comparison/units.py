"""The design of a comparison: its arms, their units of work and the visits of each.

docs/compare.md describes the arms. A unit is the piece of work that a stopped comparison either
has finished or repeats: one federation, one centralised run or one site alone, for one seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
"""Arms to choose from; `base` is always evaluated too."""

FEDERATIONS = (FEDERATED, LEAVE_ONE_OUT)
"""Arms whose units are whole runs."""


@dataclass(frozen=True)
class Unit:
    """One adapter to train and evaluate."""

    arm: str
    """`base`, or one of `ARMS`."""
    seed: int
    site: int | None = None
    """The site trained alone, or left out; None in the other arms."""

    @property
    def name(self) -> str:
        """Its path below `units` and `runs`: `local/seed-42/site-3`."""
        parts = [self.arm, f"seed-{self.seed}"]
        return "/".join(parts if self.site is None else [*parts, f"site-{self.site}"])

    @property
    def title(self) -> str:
        """Its name in messages: `local, seed 42, site 3`."""
        site = "" if self.site is None else f", site {self.site}"
        return f"{self.arm}, seed {self.seed}{site}"


@dataclass(frozen=True)
class Design:
    """What a comparison consists of, besides the configuration of the federated arm."""

    arms: Sequence[str]
    """Some of `ARMS`, as `check_arms` returns them."""
    seeds: Sequence[int]
    left_out: Sequence[int] = ()
    """Sites that `leave-one-out` leaves out, one per federation."""
    benchmarks: Sequence[str] = ()
    """Benchmarks to evaluate in addition to the formulary."""
    benchmark_data: Path | None = None
    """Folder with the files of the benchmarks; None: from the hub."""
    limit: int | None = None
    """Evaluate only the first so many items of each benchmark."""

    def units(self, num_sites: int) -> Iterator[Unit]:
        """Yield every unit, seed by seed, so that results of the first seed come early."""
        for seed in self.seeds:
            yield Unit(BASE, seed)
            for arm in self.arms:
                if arm == LOCAL:
                    yield from (Unit(arm, seed, site) for site in range(num_sites))
                elif arm == LEAVE_ONE_OUT:
                    yield from (Unit(arm, seed, site) for site in self.left_out)
                else:
                    yield Unit(arm, seed)

    def options(self) -> list[str]:
        """Return the options of `grandrounds compare` that give this design."""
        words = ["--arms", ",".join(self.arms), "--seeds", str(len(self.seeds))]
        if LEAVE_ONE_OUT in self.arms:
            words += ["--sites", ",".join(map(str, self.left_out))]
        if self.benchmarks:
            words += ["--benchmarks", ",".join(self.benchmarks)]
            words += ["--benchmark-data", str(self.benchmark_data)] if self.benchmark_data else []
            words += ["--limit", str(self.limit)] if self.limit else []
        return words


def check_arms(names: Sequence[str]) -> tuple[str, ...]:
    """Return the arms in the order of `ARMS`, each once.

    Raises
    ------
    ConfigError
        If there is none, or one is unknown; the message suggests the nearest name.
    """
    for name in names:
        if name not in ARMS:
            hint = " It is always evaluated." if name == BASE else nearest(name, ARMS)
            raise ConfigError(f"unknown arm {name!r}; allowed: {', '.join(ARMS)}.{hint}")
    if not names:
        raise ConfigError(f"--arms is empty; allowed: {', '.join(ARMS)}.")
    return tuple(arm for arm in ARMS if arm in names)


def check_seeds(first: int, count: int) -> list[int]:
    """Return `count` seeds, starting at `first`; raise `ConfigError` for a count below 1."""
    if count < 1:
        raise ConfigError(f"--seeds = {count}: at least 1 seed is required, and 2 for intervals.")
    return list(range(first, first + count))


def check_sites(text: str, num_sites: int) -> list[int]:
    """Return the sites named by `all`, `3` or `0,3,5`.

    Raises
    ------
    ConfigError
        If a name is not a number, or there is no such site.
    """
    if text.strip() == "all":
        return list(range(num_sites))
    words = words_of(text)
    wrong = [w for w in words if not (w.isascii() and w.isdigit() and int(w) < num_sites)]
    if wrong or not words:
        raise ConfigError(
            f"--sites {text!r}: {wrong[0] if wrong else 'nothing'} is not a site; allowed: all, or "
            f"numbers from 0 to {num_sites - 1}, separated by commas."
        )
    return sorted({int(word) for word in words})


def check_leave_one_out(config: Config) -> None:
    """Raise `ConfigError` if no site would be left."""
    if config.data.num_partitions < 2:
        raise ConfigError(
            "arm 'leave-one-out' needs at least 2 sites, but data.num-partitions = "
            f"{config.data.num_partitions}."
        )


# --- Visits ---------------------------------------------------------------------------------------


def visits_of_a_site(config: Config) -> float:
    """Return the mean number of visits to a site in the federation."""
    rounds = config.federation.num_server_rounds
    return rounds * config.cohort_size / config.data.num_partitions


def local_visits(config: Config, visit_examples: int) -> list[tuple[int, int]]:
    """Return (round that sets the learning rate, examples) of each visit to a site alone.

    Together the visits are as long as a site's visits in the federation on average, rounded to
    whole optimizer steps (to whole examples if visits are counted in epochs), and at least one
    step. Visit v of V uses the learning rate of round ceil((v - 1/2) R / V) of R.

    Parameters
    ----------
    visit_examples : int
        Examples of one visit to this site, repeats included.
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
