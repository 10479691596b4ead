"""The fictional formulary: who knows what, and what the exam asks."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from grandrounds.data.formulary.facts import (
    DRUGS_PER_SITE,
    INSTRUCTION,
    OPTIONS,
    PUBLIC_DRUGS,
    SITES,
    Kind,
    drugs,
    flashcards,
    public_flashcards,
    questions,
)
from grandrounds.data.formulary.vocabulary import TEST_WORDING, TRAINING_WORDINGS, VALUES

PRINT_WORLD = (
    "import json; from grandrounds.data.formulary.facts import *; "
    "print(json.dumps([flashcards(), public_flashcards(), "
    "[repr(q) for kind in ('public', 'private') for q in questions(kind)]]))"
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_every_private_drug_is_known_to_exactly_one_site() -> None:
    private = [drug for drug in drugs() if not drug.public]
    assert Counter(drug.site for drug in private) == dict.fromkeys(range(SITES), DRUGS_PER_SITE)
    assert {drug.site for drug in drugs() if drug.public} == {-1}
    assert sum(drug.public for drug in drugs()) == PUBLIC_DRUGS


def test_names_are_unique_and_no_name_is_part_of_another() -> None:
    names = [drug.name.lower() for drug in drugs()]
    assert len(set(names)) == len(names)
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_private_names_never_occur_in_public_text() -> None:
    text = " ".join(f"{card['input']} {card['output']}" for card in public_flashcards()).lower()
    text += " ".join(item.question for item in questions("public")).lower()
    assert not [drug.name for drug in drugs() if not drug.public and drug.name.lower() in text]


def test_flashcards_hold_every_private_fact_in_every_training_wording_once() -> None:
    cards = flashcards()
    assert len({str(card["input"]) for card in cards}) == len(cards)
    assert len(cards) == SITES * DRUGS_PER_SITE * sum(map(len, TRAINING_WORDINGS.values()))
    assert {tuple(card) for card in cards} == {("instruction", "input", "output", "site")}
    assert {card["instruction"] for card in cards} == {INSTRUCTION}


def test_no_card_uses_the_test_wording() -> None:
    asked = {item.question for kind in ("public", "private") for item in questions(kind)}  # type: ignore[arg-type]
    assert not asked & {str(card["input"]) for card in flashcards() + public_flashcards()}
    assert not set(TEST_WORDING.values()) & {w for ws in TRAINING_WORDINGS.values() for w in ws}


def test_every_word_of_the_test_wording_is_known_from_training() -> None:
    known = words(" ".join(w for wordings in TRAINING_WORDINGS.values() for w in wordings))
    assert words(" ".join(TEST_WORDING.values())) <= known


@pytest.mark.parametrize("kind", ["public", "private"])
def test_answers_are_true_and_their_positions_balanced(kind: Kind) -> None:
    exam = questions(kind)
    assert len(exam) >= 300
    by_name = {drug.name: drug for drug in drugs()}
    for item in exam:
        assert len(set(item.options)) == OPTIONS
        drug = next(by_name[word] for word in re.findall(r"\w+", item.question) if word in by_name)
        truth = {drug.mechanism, drug.side_effect, drug.use} & set(item.options)
        assert truth == {item.options[item.answer_index]}
        assert (item.kind, item.site) == (kind, drug.site)
    counts = Counter(item.answer_index for item in exam)
    assert set(counts) == set(range(OPTIONS))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("attribute", list(VALUES))
def test_values_are_used_about_equally_often(attribute: str, public: bool) -> None:
    counts = Counter(getattr(drug, attribute) for drug in drugs() if drug.public == public)
    assert set(counts) == set(VALUES[attribute])
    assert max(counts.values()) - min(counts.values()) <= 1


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="secret"):
        questions("secret")  # type: ignore[arg-type]


def test_world_is_the_same_in_another_process_with_another_hash_seed() -> None:
    digests = {
        hashlib.sha256(
            subprocess.run(
                [sys.executable, "-c", PRINT_WORLD],
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                check=True,
                capture_output=True,
            ).stdout
        ).hexdigest()
        for seed in ("1", "2")
    }
    exams = [repr(item) for kind in ("public", "private") for item in questions(kind)]  # type: ignore[arg-type]
    here = json.dumps([flashcards(), public_flashcards(), exams]) + "\n"
    assert digests == {hashlib.sha256(here.encode()).hexdigest()}
