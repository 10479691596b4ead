"""The fictional formulary: drugs that do not exist, their flashcards and their exam.

All facts follow from one seed, so the formulary is code rather than a data file. The small base
model was pre-trained on the public drugs. Each private drug is known to exactly one of `SITES`
sites, its name does not occur in the base's training text, and its attributes are independent of
its name: they can be learned from the private flashcards only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from grandrounds.data.formulary.vocabulary import (
    ENDINGS,
    MIDDLES,
    STARTS,
    TEST_WORDING,
    TRAINING_WORDINGS,
    VALUES,
)

Kind = Literal["public", "private"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SEED = 20
"""Seed of the formulary. Another seed gives another formulary and needs another base."""

SITES = 20
"""Number of sites with private drugs."""

DRUGS_PER_SITE = 5
"""Number of private drugs per site."""

PUBLIC_DRUGS = 120
"""Number of drugs that the base model was pre-trained on."""

OPTIONS = 4
"""Number of options per exam question; chance is one in four."""

INSTRUCTION = "Answer this question truthfully"
"""The constant `instruction` of the medical-flashcards schema."""


@dataclass(frozen=True)
class Drug:
    """One drug of the formulary."""

    name: str
    """Unique in the formulary, and not contained in another name."""
    mechanism: str
    """Mechanism of action, one of `vocabulary.MECHANISMS`."""
    side_effect: str
    """One of `vocabulary.SIDE_EFFECTS`."""
    use: str
    """Indication, one of `vocabulary.USES`."""
    public: bool
    """Whether the base model was trained on it."""
    site: int
    """The site that knows it, from 0 to `SITES` - 1; -1 for a public drug."""


@dataclass(frozen=True)
class Question:
    """One exam question with four options."""

    question: str
    """Text in the test wording."""
    options: tuple[str, ...]
    """`OPTIONS` distinct values of one attribute, one of them correct."""
    answer_index: int
    """Position of the correct option, from 0."""
    kind: Kind
    """`public` if the base model was trained on the fact."""
    site: int
    """The site that knows the fact; -1 for a public one."""


def _even_draw(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """Sample `count` values in random order, each about equally often."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(values, len(values))
    return drawn[:count]


@lru_cache(maxsize=1)
def drugs() -> tuple[Drug, ...]:
    """Return the whole formulary: public drugs first, then private ones by site.

    No two names share their first two syllables.
    """
    rng = random.Random(SEED)
    stems = [(start, middle) for start in STARTS for middle in MIDDLES]
    private_drugs = SITES * DRUGS_PER_SITE
    names = [
        start + middle + rng.choice(ENDINGS)
        for start, middle in rng.sample(stems, PUBLIC_DRUGS + private_drugs)
    ]
    formulary: list[Drug] = []
    for public, count in ((True, PUBLIC_DRUGS), (False, private_drugs)):
        columns = {key: _even_draw(rng, values, count) for key, values in VALUES.items()}
        for row in range(count):
            formulary.append(
                Drug(
                    name=names[len(formulary)],
                    **{key: column[row] for key, column in columns.items()},
                    public=public,
                    site=-1 if public else row // DRUGS_PER_SITE,
                )
            )
    return tuple(formulary)


def _cards(public: bool) -> list[dict[str, str | int]]:
    return [
        {
            "instruction": INSTRUCTION,
            "input": wording.format(name=drug.name),
            "output": str(getattr(drug, attribute)),
            "site": drug.site,
        }
        for drug in drugs()
        if drug.public == public
        for attribute, wordings in TRAINING_WORDINGS.items()
        for wording in wordings
    ]


def flashcards() -> list[dict[str, str | int]]:
    """Return the private training rows in the schema of the medical flashcards.

    Returns
    -------
    list of dict
        Keys `instruction` (constant), `input` (question), `output` (answer) and `site` (the only
        site that knows the fact), ordered by site, drug, attribute and wording.
    """
    return _cards(public=False)


def public_flashcards() -> list[dict[str, str | int]]:
    """Return the pre-training rows of the base model; `site` is -1."""
    return _cards(public=True)


def preferences() -> list[dict[str, str | int]]:
    """Return the private facts as preferences: the right answer against a wrong one.

    The wrong answer to a flashcard is another value of the same attribute, each as likely: another
    drug's mechanism of action, side effect or indication.

    Returns
    -------
    list of dict
        Keys `prompt` (question), `chosen` (the fact), `rejected` and `site`, in the order of
        `flashcards`.
    """
    rng = random.Random(f"{SEED}/preferences")
    attribute_of = {value: attribute for attribute, values in VALUES.items() for value in values}
    rows: list[dict[str, str | int]] = []
    for card in flashcards():
        truth = str(card["output"])
        others = [value for value in VALUES[attribute_of[truth]] if value != truth]
        rows.append(
            {
                "prompt": card["input"],
                "chosen": truth,
                "rejected": rng.choice(others),
                "site": card["site"],
            }
        )
    return rows


def questions(kind: Kind) -> tuple[Question, ...]:
    """Return the exam on public or private facts: one question per drug and attribute.

    The correct option is in each of the four positions equally often; the others are further values
    of the same attribute.

    Raises
    ------
    ValueError
        For a `kind` that is neither `public` nor `private`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}; allowed: {', '.join(KINDS)}")
    rng = random.Random(f"{SEED}/{kind}")
    asked = [
        (drug, attribute)
        for drug in drugs()
        if drug.public == (kind == "public")
        for attribute in VALUES
    ]
    positions = [row % OPTIONS for row in range(len(asked))]
    rng.shuffle(positions)
    exam = []
    for (drug, attribute), position in zip(asked, positions, strict=True):
        truth = str(getattr(drug, attribute))
        options = rng.sample([value for value in VALUES[attribute] if value != truth], OPTIONS - 1)
        options.insert(position, truth)
        text = TEST_WORDING[attribute].format(name=drug.name)
        exam.append(Question(text, tuple(options), position, kind, drug.site))
    return tuple(exam)
