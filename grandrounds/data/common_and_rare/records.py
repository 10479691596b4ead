"""Records of patients: what differential privacy must keep, and what it must hide.

A few common drugs are given to many patients: what their records say is knowledge, and does not
depend on any one of them. Each rare drug is given to a single patient: a model that knows it has
memorised that patient's record. Half of the candidates with a rare drug are in the data, drawn by a
seed; the others never are, so that a score on both measures memory and nothing else.

Every record is one question and answer of one patient. The answers are the formulary's closed lists
of 24 values, so the rank of the true one is exact. No name of a drug occurs in the formulary, on
whose public half the base was trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from grandrounds.data.formulary.facts import INSTRUCTION, drugs
from grandrounds.data.formulary.vocabulary import (
    ENDINGS,
    MIDDLES,
    STARTS,
    TEST_WORDING,
    TRAINING_WORDINGS,
    VALUES,
)

SEED = 17
"""Seed of names, facts and records. Which rare patients are in the data has a seed of its own."""

COMMON_DRUGS = 6
"""Drugs that many patients take, with one fact for each attribute: 18 common facts."""

RECORDS_OF_A_FACT = 100
"""Patients whose record states a common fact."""

RARE_PATIENTS = 105
"""Patients in the data whose drug nobody else takes; as many candidates are not in the data."""

SITES = 5
"""Hospitals of the natural partition: each has 20 records of a common fact, and 21 rare facts."""

INITIALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""A question begins with the patient's initial, so that no two records of a fact are equal."""

NUM_RECORDS = COMMON_DRUGS * len(VALUES) * RECORDS_OF_A_FACT + RARE_PATIENTS
"""Records of the world, each of a patient of its own: 1,905."""


@dataclass(frozen=True)
class Fact:
    """What a record states of a drug."""

    drug: str
    attribute: str
    """A key of `vocabulary.VALUES`."""
    value: str
    """One of the attribute's 24 values."""

    @property
    def values(self) -> Sequence[str]:
        """The closed list that the value is from."""
        return VALUES[self.attribute]

    @property
    def question(self) -> str:
        """The question in the exam's wording, which no record uses."""
        return TEST_WORDING[self.attribute].format(name=self.drug)


@dataclass(frozen=True)
class Record:
    """One question and answer of a patient."""

    patient: int
    """From 1; a patient has one record."""
    site: int
    """The patient's hospital, from 0 to `SITES` - 1."""
    question: str
    """Begins with the patient's initial."""
    fact: Fact


@dataclass(frozen=True)
class World:
    """The records of one draw of the rare patients."""

    common: tuple[Record, ...]
    """`RECORDS_OF_A_FACT` for each common fact."""
    rare: tuple[Record, ...]
    """In the data: one record for each of `RARE_PATIENTS` facts."""
    absent: tuple[Record, ...]
    """Not in the data: the candidates that were not drawn."""

    @property
    def records(self) -> tuple[Record, ...]:
        """What is in the data, by patient: the order says nothing about the kind."""
        return tuple(sorted((*self.common, *self.rare), key=lambda record: record.patient))


@lru_cache(maxsize=1)
def _facts() -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Return the common facts, and those of all candidates with a rare drug."""
    rng = random.Random(SEED)
    taken = tuple(drug.name for drug in drugs())
    stems = [s + m for s in STARTS for m in MIDDLES if not any(n.startswith(s + m) for n in taken)]
    candidates = 2 * RARE_PATIENTS
    names = [stem + rng.choice(ENDINGS) for stem in rng.sample(stems, COMMON_DRUGS + candidates)]
    drawn = {key: rng.sample(values, COMMON_DRUGS) for key, values in VALUES.items()}
    common = [
        Fact(names[row], key, drawn[key][row]) for key in VALUES for row in range(COMMON_DRUGS)
    ]
    rare = []
    for number, name in enumerate(names[COMMON_DRUGS:]):
        attribute = list(VALUES)[number % len(VALUES)]
        rare.append(Fact(name, attribute, rng.choice(VALUES[attribute])))
    return tuple(common), tuple(rare)


def common_facts() -> tuple[Fact, ...]:
    """Return the facts that many records state: three of each common drug."""
    return _facts()[0]


@lru_cache(maxsize=32)
def world(draw: int = 0) -> World:
    """Return the records, with the rare patients of one draw.

    Parameters
    ----------
    draw : int
        Seed of the choice among the rare candidates; the data named `common-and-rare` are draw 0.
    """
    common, candidates = _facts()
    rng = random.Random(f"{SEED}/records")
    stated = [fact for fact in common for _ in range(RECORDS_OF_A_FACT)]
    patients = list(range(1, len(stated) + len(candidates) + 1))
    rng.shuffle(patients)
    numbers = iter(patients)
    of_common = [
        _record(next(numbers), row % SITES, fact, row % RECORDS_OF_A_FACT)
        for row, fact in enumerate(stated)
    ]
    wordings = [rng.randrange(5 * len(INITIALS)) for _ in candidates]
    of_rare = [
        _record(next(numbers), row % SITES, fact, wording)
        for row, (fact, wording) in enumerate(zip(candidates, wordings, strict=True))
    ]
    inside = set[int]()
    for site in range(SITES):  # as many of each hospital's candidates are in the data as not
        of_site = range(site, len(candidates), SITES)
        inside |= set(random.Random(f"{SEED}/{draw}/{site}").sample(of_site, len(of_site) // 2))
    return World(
        tuple(of_common),
        tuple(record for row, record in enumerate(of_rare) if row in inside),
        tuple(record for row, record in enumerate(of_rare) if row not in inside),
    )


def _record(patient: int, site: int, fact: Fact, wording: int) -> Record:
    wordings = TRAINING_WORDINGS[fact.attribute]
    asked = wordings[wording % len(wordings)].format(name=fact.drug)
    initial = INITIALS[wording // len(wordings) % len(INITIALS)]
    return Record(patient, site, f"{initial}: {asked}", fact)


def rows(draw: int = 0) -> list[dict[str, str | int]]:
    """Return the training rows in the schema of the medical flashcards.

    Returns
    -------
    list of dict
        Keys `instruction` (constant), `input` (question), `output` (answer), `patient` (one row
        each: the unit of privacy) and `site` (hospital), ordered by patient.
    """
    return [
        {
            "instruction": INSTRUCTION,
            "input": record.question,
            "output": record.fact.value,
            "patient": record.patient,
            "site": record.site,
        }
        for record in world(draw).records
    ]
