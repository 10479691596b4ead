"""Benchmark questions found in training data, against brute force and on real data."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grandrounds.data.sources import load_rows
from grandrounds.study.evaluation import overlap as overlap_module
from grandrounds.study.evaluation.benchmarks import load_questions
from grandrounds.study.evaluation.overlap import Overlap, check_overlap, find_overlap
from tests.places import SHARED
from tests.study.evaluation.small import MEDMCQA, medmcqa_rows, write_lines

DATA = SHARED
WIKIDOC = DATA / "train/wikidoc_patient_information.jsonl.gz"
needs_data = pytest.mark.skipif(not WIKIDOC.exists(), reason="shared/data is not here")

QUESTION = "Which drug is the first choice in status epilepticus of adults?"


def read(name: str, column: str) -> list[str]:
    with gzip.open(DATA / "eval" / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line)[column] for line in file]


def wikidoc() -> tuple[list[str], list[str]]:
    """Return the questions and the answers of the training data."""
    rows = load_rows(str(WIKIDOC), question_column="input", answer_column="output")
    return list(rows["input"]), list(rows["output"])


def pairs(overlaps: list[Overlap]) -> list[tuple[int, int, str]]:
    return [(overlap.item, overlap.row, overlap.kind) for overlap in overlaps]


def words(first: int, last: int) -> list[str]:
    """Return different words, numbered."""
    return [f"word{i}" for i in range(first, last)]


def test_importing_the_module_loads_no_library() -> None:
    code = (
        "import sys, grandrounds.study.evaluation.overlap\n"
        "print({'numpy', 'scipy', 'datasketch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- Word for word --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        "  WHICH drug is the first choice -- in status\u00a0epilepticus\nof adults",
        "Which drug is the \ufb01rst choice in status epilep\u00adticus of adults?",
        "\uff37\uff48\uff49\uff43\uff48 drug is the first choice in status epilepticus of adults?",
    ],
)
def test_case_blanks_punctuation_and_unicode_forms_do_not_hide_a_question(text: str) -> None:
    (overlap,) = find_overlap([QUESTION], ["Rest and tea.", text])
    assert (overlap.item, overlap.row, overlap.kind) == (0, 1, "exact")
    assert overlap.similarity == 1.0


def test_composed_and_decomposed_letters_are_equal() -> None:
    assert pairs(find_overlap(["Ménière"], ["Me\u0301nie\u0300re"])) == [(0, 0, "exact")]


def test_a_question_inside_a_longer_text_is_exact_with_the_similarity_of_the_whole() -> None:
    """Eleven words give pairs (11 // 4 = 2): ten of them.

    Nine words before and ten after make a text of 30 words, 29 pairs; similarity 10 / 29.
    """
    text = " ".join([*words(0, 9), QUESTION, *words(9, 19)])
    (overlap,) = find_overlap([QUESTION], [text])
    assert overlap.kind == "exact"
    assert overlap.similarity == pytest.approx(10 / 29)


def test_only_whole_words_are_contained() -> None:
    assert not find_overlap(["the liver is an organ"], ["the liver is an organism of many cells"])


def test_a_question_of_few_words_must_be_the_whole_text() -> None:
    assert not find_overlap(["Pneumonia is:"], ["Pneumonia is an inflammation of the lung."])
    assert pairs(find_overlap(["Pneumonia is:"], ["pneumonia is"])) == [(0, 0, "exact")]


def test_texts_without_words_overlap_with_nothing() -> None:
    assert not find_overlap(["", "?!", "A real question"], ["", "?!", " "])
    assert not find_overlap([], [QUESTION])
    assert not find_overlap([QUESTION], [])


def test_equal_questions_and_equal_texts_give_every_pair_in_order() -> None:
    found = find_overlap([QUESTION, "Other?", QUESTION], [QUESTION, "No.", QUESTION])
    assert [pair[:2] for pair in pairs(found)] == [(0, 0), (0, 2), (2, 0), (2, 2)]


# --- Nearly so ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "found"), [(49, True), (48, False)])
def test_one_word_replaced_in_the_middle_is_near_from_49_words_on(count: int, found: bool) -> None:
    """w words have w - 4 shingles of five; the replaced word is in five of them.

    Similarity (w - 9) / (w + 1): 40 / 50 = 0.8 for 49 words, 39 / 49 = 0.796 for 48.
    """
    question = words(0, count)
    changed = [*question[:20], "other", *question[21:]]
    overlaps = find_overlap([" ".join(question)], [" ".join(changed)])
    assert pairs(overlaps) == ([(0, 0, "near")] if found else [])
    if found:
        assert overlaps[0].similarity == 0.8


def test_short_questions_are_compared_by_smaller_shingles() -> None:
    """Twelve words give triples: ten. One word less at the end leaves nine of ten."""
    question = words(0, 12)
    (overlap,) = find_overlap([" ".join(question)], [" ".join(question[:11])])
    assert (overlap.kind, overlap.similarity) == ("near", 0.9)


def test_another_word_in_a_short_question_makes_another_question() -> None:
    assert not find_overlap(
        ["Which of the following is a branch of the facial nerve in man?"],
        ["Which of the following is a branch of the optic nerve in man?"],
    )


def test_repeated_words_in_another_number_are_near() -> None:
    """Bags of one word: {pain} and {pain} are equal sets, the texts are not."""
    overlaps = find_overlap(["pain pain"], ["pain pain pain"])
    assert [(overlap.kind, overlap.similarity) for overlap in overlaps] == [("near", 1.0)]


def test_a_lower_threshold_finds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    question, text = words(0, 40), words(10, 50)
    arguments = [" ".join(question)], [" ".join(text)]
    assert not find_overlap(*arguments)
    monkeypatch.setattr(overlap_module, "THRESHOLD", 0.55)
    (overlap,) = find_overlap(*arguments)  # 26 of 46 shingles
    assert overlap.similarity == pytest.approx(26 / 46)


def brute_force(questions: list[str], texts: list[str], threshold: float) -> set[Any]:
    """Compare every pair, for texts of lower-case words with single blanks."""
    found = set()
    for item, question in enumerate(questions):
        wanted = question.split()
        size = min(5, max(1, len(wanted) // 4))
        for row, text in enumerate(texts):
            given = text.split()
            ours = {tuple(wanted[i : i + size]) for i in range(len(wanted) - size + 1)}
            theirs = {tuple(given[i : i + size]) for i in range(len(given) - size + 1)}
            similarity = len(ours & theirs) / len(ours | theirs)
            contained = len(wanted) >= 5 and f" {question} " in f" {text} "
            if question == text or contained:
                found.add((item, row, "exact", similarity))
            elif similarity >= threshold:
                found.add((item, row, "near", similarity))
    return found


texts = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=24).map(" ".join), max_size=6
)


@settings(derandomize=True, deadline=None)
@given(texts, texts, st.sampled_from([0.5, 0.8, 1.0]))
def test_results_are_those_of_comparing_every_pair(
    questions: list[str], rows: list[str], threshold: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_module, "THRESHOLD", threshold)
        overlaps = find_overlap(questions, rows)
    found = [(found.item, found.row, found.kind, found.similarity) for found in overlaps]
    assert len(found) == len(set(found))
    assert set(found) == brute_force(questions, rows, threshold)


@pytest.mark.slow
def test_results_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from grandrounds.study.evaluation.overlap import find_overlap\n"
        "q = [' '.join(f'w{i * j % 97}' for i in range(9 + j)) for j in range(1, 40)]\n"
        "t = [' '.join(f'w{i * j % 97}' for i in range(8 + j)) for j in range(1, 40)]\n"
        "print([(o.item, o.row, o.kind, o.similarity) for o in find_overlap(q, t)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "near" in outputs.pop()


# --- A report -------------------------------------------------------------------------------------


def test_overlap_counts_and_lists_the_items_found_in_training_data(
    data: Path, tmp_path: Path
) -> None:
    question = medmcqa_rows(MEDMCQA)[4]["question"]
    rows = [
        {"input": "What is rest?", "output": "Something else entirely."},
        {"input": f"Tell me. {question}", "output": "Tea."},
    ]
    training = write_lines(tmp_path / "cards.jsonl", rows)
    report = check_overlap(str(training), load_questions(["medmcqa", "pubmedqa"], data))
    found = report["benchmarks"]["medmcqa"]
    assert (found["n"], found["items"], found["exact"], found["near"]) == (MEDMCQA, 1, 1, 0)
    (pair,) = found["found"]
    assert (pair["item"], pair["training_row"], pair["column"]) == (5, 2, "input")
    assert report["benchmarks"]["pubmedqa"]["items"] == 0


# --- Real data ------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_data
def test_medqa_is_not_in_the_patient_information() -> None:
    questions, answers = wikidoc()
    assert find_overlap(read("medqa", "question"), [*questions, *answers]) == []


@pytest.mark.slow
@needs_data
def test_leaks_planted_into_real_data_are_found_and_nothing_else() -> None:
    """Every tenth MedQA question leaks: whole, inside an answer, or with a word replaced."""
    questions = read("medqa", "question")
    _, rows = wikidoc()
    leaks: dict[int, tuple[int, str]] = {}
    for item in range(0, len(questions), 10):
        row = 7 * item
        tokens = questions[item].split()
        place = len(tokens) // 2
        leak, kind = [
            (questions[item].upper(), "exact"),
            (f"{rows[row]} {questions[item]} {rows[row]}", "exact"),
            (" ".join([*tokens[:place], "otherwise", *tokens[place + 1 :]]), "near"),
        ][item // 10 % 3]
        if kind == "near" and len(tokens) < 60:
            continue
        leaks[item] = (row, kind)
        rows[row] = leak
    assert len(leaks) > 50
    found = find_overlap(questions, rows)
    assert {(leak.item, leak.row, leak.kind) for leak in found} == {
        (item, row, kind) for item, (row, kind) in leaks.items()
    }


@needs_data
@pytest.mark.slow
def test_minhash_misses_none_of_the_near_duplicates_of_real_questions() -> None:
    """MedMCQA with words dropped at random, against the shared n-grams of every pair."""
    generator = random.Random(0)
    originals = [
        " ".join("".join(c if c.isalnum() else " " for c in question.lower()).split())
        for question in read("medqa", "question") + read("medmcqa", "question")
    ]
    questions = [question for question in originals if question.isascii()][:1500]
    rows = [
        " ".join(word for word in question.split() if generator.random() > 0.01)
        for question in questions
    ]
    found = {(o.item, o.row, o.kind, o.similarity) for o in find_overlap(questions, rows)}
    expected = brute_force_of_pairs(questions, rows)
    assert sum(kind == "near" for _, _, kind, _ in expected) > 100
    assert found == expected


def brute_force_of_pairs(questions: list[str], rows: list[str]) -> set[Any]:
    """Run `brute_force` on the pairs that share at least half of the question's words."""
    found = set()
    vocabularies = [set(row.split()) for row in rows]
    for item, question in enumerate(questions):
        wanted = set(question.split())
        for row, there in enumerate(vocabularies):
            if 2 * len(wanted & there) >= len(wanted):
                for _, _, kind, similarity in brute_force([question], [rows[row]], 0.8):
                    found.add((item, row, kind, similarity))
    return found


@needs_data
@pytest.mark.slow
def test_five_thousand_texts_and_two_thousand_questions_take_under_twenty_seconds() -> None:
    benchmark = (read("medqa", "question") + read("medmcqa", "question"))[:2000]
    questions, answers = wikidoc()
    joined = [f"{question} {answer}" for question, answer in zip(questions, answers, strict=True)]
    start = time.process_time()
    find_overlap(benchmark, joined)
    assert time.process_time() - start < 20
