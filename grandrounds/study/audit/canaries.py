"""Fresh canaries in a synthetic world: facts that nobody knows, one record each, half of them in.

The names are new and the values drawn by the operating system, so that neither base nor world tells
them; so are the coins that put each canary in or leave it out. No site's data are read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grandrounds import storage
from grandrounds.data.formulary.facts import INSTRUCTION, drugs, flashcards, public_flashcards
from grandrounds.data.formulary.vocabulary import (
    ENDINGS,
    MIDDLES,
    STARTS,
    TRAINING_WORDINGS,
    VALUES,
)
from grandrounds.errors import ConfigError

SITE = "site"
"""Column of the world's rows: the site that has the row."""

Row = dict[str, str | int]


@dataclass(frozen=True)
class Canary:
    """One fact about one drug, which is one record where it is in."""

    question: str
    options: tuple[str, ...]
    """The closed list that the true value was drawn from."""
    true: int
    """Position of the true value."""
    site: int
    is_in: bool
    """Its coin."""

    @property
    def answer(self) -> str:
        """The true value."""
        return self.options[self.true]

    @property
    def row(self) -> Row:
        """The record, in the schema of the flashcards."""
        return {
            "instruction": INSTRUCTION,
            "input": self.question,
            "output": self.answer,
            SITE: self.site,
        }


def most_canaries() -> int:
    """Return how many names are left beside the formulary's."""
    return len(STARTS) * len(MIDDLES) * len(ENDINGS) - len(drugs()) * len(ENDINGS)


def check_count(count: int) -> None:
    """Raise `ConfigError` if there are not so many names, or too few to measure anything."""
    if not 20 <= count <= most_canaries():
        raise ConfigError(
            f"--canaries {count} is not allowed: use 20 to {most_canaries():,}; 200 can show an "
            "epsilon of about 3.7 at most, 1,000 one of about 5.3."
        )


def fresh_canaries(
    count: int, sites: int, coins: random.Random | None = None
) -> tuple[Canary, ...]:
    """Return new canaries, spread evenly over the sites, each in or out by a fair coin of its own.

    Parameters
    ----------
    coins
        For tests; by default the operating system's. Coins that anybody knows audit nothing.

    Raises
    ------
    ConfigError
        As for `check_count`.
    """
    check_count(count)
    coins = coins or random.SystemRandom()
    known = tuple(drug.name for drug in drugs())
    free = [stem for stem in _stems() if not any(name.startswith(stem) for name in known)]
    names = [stem + ending for stem in free for ending in ENDINGS]
    attributes = list(VALUES)
    found = []
    for number, name in enumerate(coins.sample(names, count)):
        attribute = attributes[number % len(attributes)]
        options = VALUES[attribute]
        found.append(
            Canary(
                question=coins.choice(TRAINING_WORDINGS[attribute]).format(name=name),
                options=options,
                true=coins.randrange(len(options)),
                site=number % sites,
                is_in=coins.random() < 0.5,
            )
        )
    return tuple(found)


def _stems() -> Iterable[str]:
    return (start + middle for start in STARTS for middle in MIDDLES)


def world(canaries: Sequence[Canary], sites: int, records: int, repeats: bool) -> list[Row]:
    """Return the rows of all sites: the formulary's, and the canaries that are in.

    Parameters
    ----------
    records : int
        Records of each site, canaries included.
    repeats : bool
        Whether rows of the formulary are repeated where there are not enough: as units of their
        own. Otherwise sites may be smaller.
    """
    rows = [*flashcards(), *public_flashcards()]
    if not repeats:
        records = min(records, len(rows))
    found: list[Row] = []
    for site in range(sites):
        own = [canary.row for canary in canaries if canary.site == site and canary.is_in]
        start = site * len(rows) // sites
        background = max(1, records - len(own))
        found += [{**rows[(start + i) % len(rows)], SITE: site} for i in range(background)]
        found += own
    return found


def write_world(file: Path, rows: Iterable[Row]) -> None:
    """Write a world's rows as JSON lines."""
    storage.write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))
