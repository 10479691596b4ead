"""Protocol `flowertune`: published prompts, figures and files come out to the byte."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grandrounds.errors import DataError
from grandrounds.study.evaluation.benchmarks import Item, benchmarks, get_benchmark, load_items
from grandrounds.study.evaluation.flowertune import (
    Generation,
    accuracy_line,
    build_prompt,
    gold_text,
    max_new_tokens,
    model_input,
    prompt_hash,
    read_answer,
    read_generations,
    rescore,
    result_names,
    write_accuracy,
    write_generations,
)
from tests.places import SHARED

NAMES = ("pubmedqa", "medqa", "medmcqa")
HASHES = {
    "pubmedqa": "dc9828c5b5f72cf1",
    "medqa": "7af10e71ce27fe36",
    "medmcqa": "f42097ee15b0b10d",
}
"""Computed where the recorded prompts were at hand and rebuilt to the byte."""

real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no recorded answers at {SHARED}")


def recorded(name: str, model: str) -> Path:
    return SHARED / "recorded" / f"generation_{name}_{model}.jsonl.gz"


def multiple_choice(question: str = "What helps?") -> Item:
    return Item(row=1, question=question, options=("tea", "rest", "salt", "heat"), gold_index=1)


def answers(*pairs: tuple[str, str]) -> list[Generation]:
    """Records from (gold, output)."""
    return [Generation("prompt", gold, output) for gold, output in pairs]


# --- Recorded results -----------------------------------------------------------------------------


@real
@pytest.mark.parametrize("model", ["qwen2.5-7b", "smollm2-360m"])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_answers_give_the_recorded_accuracy_file(name: str, model: str) -> None:
    records = read_generations(recorded(name, model))
    benchmark = get_benchmark(name)
    score = rescore(records, benchmark.labels)
    written = (SHARED / "recorded" / f"acc_{name}_{model}.txt").read_text()
    assert accuracy_line(score) == written
    assert score.n == benchmark.expected_items == sum(score.spread.values())
    assert rescore(records) == score  # the golds tell what is allowed


@real
@pytest.mark.parametrize("name", NAMES)
def test_recorded_prompts_are_rebuilt_to_the_byte(name: str) -> None:
    """Both keep the source's order, so that the rows that are there are the first recorded."""
    benchmark = get_benchmark(name)
    items = load_items(benchmark, SHARED / "eval")
    records = read_generations(recorded(name, "qwen2.5-7b"))[: len(items)]
    assert len(items) == len(records) >= 300
    assert [build_prompt(benchmark, item) for item in items] == [r.prompt for r in records]
    assert [gold_text(item) for item in items] == [record.gold for record in records]


@real
def test_a_recorded_file_is_written_again_to_the_byte(tmp_path: Path) -> None:
    original = recorded("pubmedqa", "smollm2-360m")
    plain, packed = tmp_path / "again.jsonl", tmp_path / "again.jsonl.gz"
    records = read_generations(original)
    for path in (plain, packed):
        write_generations(path, records)
        assert read_generations(path) == records
    content = gzip.decompress(original.read_bytes())
    assert plain.read_bytes() == gzip.decompress(packed.read_bytes()) == content


@real
def test_drift_to_prose_shows_in_the_recorded_spread() -> None:
    """1,299 of 4,183 outputs are `The`; five are `According`, which counts as an A."""
    score = rescore(read_generations(recorded("medmcqa", "qwen2.5-7b")))
    assert score.spread == {"A": 701, "B": 809, "C": 810, "D": 563, "other": 1300}
    assert score.format_failures == 1305
    assert score.first_letter_answers == 5
    assert score.commonest_failures == {"The": 1299, "According": 5, "When": 1}


@real
def test_an_e_among_four_options_is_no_allowed_answer() -> None:
    score = rescore(read_generations(recorded("medqa", "qwen2.5-7b")))
    assert score.spread["other"] == score.format_failures == 5
    assert score.commonest_failures == {"E": 5}


# --- Prompts --------------------------------------------------------------------------------------


def test_a_multiple_choice_prompt_is_instruction_question_options_and_the_call_to_answer() -> None:
    prompt = build_prompt(get_benchmark("medmcqa"), multiple_choice())
    assert prompt == (
        get_benchmark("medmcqa").instruction
        + "\nQuestion: What helps?\n\nOptions:\nA. tea\nB. rest\nC. salt\nD. heat"
        + "\nThe answer is:\n"
    )


@pytest.mark.parametrize(
    ("question", "asked"), [("Rest is", "Rest is?"), ("Name it.", "Name it."), ("Q? ", "Q? ?")]
)
def test_a_question_mark_is_added_unless_the_question_ends_in_one_or_in_a_full_stop(
    question: str, asked: str
) -> None:
    prompt = build_prompt(get_benchmark("medqa"), multiple_choice(question))
    assert f"\nQuestion: {asked}\n\nOptions:\n" in prompt


def test_an_abstract_stands_before_its_question_and_gets_no_question_mark() -> None:
    labels = ("yes", "no", "maybe")
    item = Item(
        row=1,
        question="Tea helps",
        context=("One.", "Two."),
        options=labels,
        labels=labels,
        gold_index=0,
    )
    prompt = build_prompt(get_benchmark("pubmedqa"), item)
    assert prompt.endswith("or maybe.\nOne.\nTwo.\nTea helps\nThe answer is:\n")
    assert gold_text(item) == "yes"


def test_the_model_reads_the_prompt_between_marks() -> None:
    assert model_input("P\n") == "<|im_start|>question\nP\n<|im_end|>\n<|im_start|>answer\n"


def test_the_prompt_hash_changes_with_the_instruction_and_the_labels() -> None:
    medqa = get_benchmark("medqa")
    changed = replace(medqa, instruction=f"{medqa.instruction} ")
    fewer = replace(medqa, labels=medqa.labels[:3])
    assert len({prompt_hash(medqa), prompt_hash(changed), prompt_hash(fewer)}) == 3
    assert prompt_hash(get_benchmark("careqa")) == prompt_hash(get_benchmark("medmcqa"))


def test_protocol_prompts_have_not_changed() -> None:
    """The recorded prompts are rebuilt only where they are at hand; this holds everywhere."""
    assert {name: prompt_hash(get_benchmark(name)) for name in NAMES} == HASHES


def test_the_token_limit_is_that_of_the_first_gold_answer_alone() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": list(text)}

    assert max_new_tokens(["no", "maybe"], tokenizer) == 2
    assert max_new_tokens(["maybe", "no"], tokenizer) == 5


# --- The rule, where the recorded answers do not reach --------------------------------------------


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("b", "b"),
        ("  b", "b"),
        ("**b**", "b"),
        ("(b) rest", "b"),
        ("because", "b"),
        ("é b", "b"),  # only ASCII letters are read
        ("the answer is b", "the answer is b"),  # t is no letter of an option
        ("e", "e"),
        ("1", "1"),
        ("", ""),
        ("\n", "\n"),
        ("so\n## d. rest\na", "d"),
        ("so\n### c", "c"),
        ("a\n##", "a\n##"),  # nothing after the mark, so nothing is read
        ("## c", "c"),  # no line before: no mark
        ("b\n## c\n## d", "c"),
    ],
)
def test_a_multiple_choice_output_is_read_by_its_first_letter(output: str, answer: str) -> None:
    assert read_answer(output, "b", "mcq") == (answer, "b")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("yes", "yes"),
        (" yes.", "yes"),
        ("yesyes", "yes"),
        ("nono", "no"),
        ("yesno", "yes"),
        ("noyes", "no"),
        ("yesyesyes", "yesyesyes"),  # pairs only: yesyes is left
        ("yesyesnono", "yesyesnono"),  # only the first kind of pair is mended
        ("yes yes", "yes yes"),
        ("maybe", "maybe"),
        ("maybe.", "maybe."),
        (" maybe", " maybe"),
        ("", ""),
        ("a", "a"),
        ("it is\n## no\nyes", "no"),
    ],
)
def test_a_yes_or_no_output_must_be_the_word_alone(output: str, answer: str) -> None:
    assert read_answer(output, "maybe", "boolean") == (answer, "maybe")


@pytest.mark.parametrize(
    ("gold", "compared"),
    [
        ("the answer is: b ### so", "b"),
        ("the answer is: b answer is: c ###", "b"),
    ],
)
def test_of_a_gold_answer_with_marks_the_part_between_counts(gold: str, compared: str) -> None:
    assert read_answer("b", gold, "mcq") == ("b", compared)


def test_a_gold_answer_with_a_mark_but_no_answer_is_compared_whole() -> None:
    assert read_answer("B rest", "b ###", "mcq") == ("B rest", "b ###")


def test_maybe_is_right_as_the_bare_word_in_any_case_and_wrong_with_a_full_stop() -> None:
    score = rescore(
        answers(("maybe", "Maybe"), ("maybe", "MAYBE"), ("maybe", "Maybe."), ("yes", "Yes."))
    )
    assert (score.correct, score.n, score.format_failures) == (3, 4, 1)
    assert score.accuracy == 0.75
    assert score.spread == {"yes": 1, "no": 0, "maybe": 2, "other": 1}


def test_because_counts_as_b_and_as_a_format_failure() -> None:
    score = rescore(answers(("B", "Because"), ("A", "**A**"), ("C", ""), ("D", "d"), ("A", "E")))
    assert score.correct == 3
    assert score.format_failures == 3  # Because, nothing, and E of four options
    assert score.first_letter_answers == 1
    assert score.spread == {"A": 1, "B": 1, "C": 0, "D": 1, "other": 2}


def test_five_options_are_told_by_the_gold_answers() -> None:
    score = rescore(answers(("E", "E"), ("A", "B")))
    assert score.spread == {"A": 0, "B": 1, "C": 0, "D": 0, "E": 1, "other": 0}
    assert score.format_failures == 0


def test_nothing_to_score_and_answers_of_another_benchmark_are_refused() -> None:
    with pytest.raises(DataError, match="no recorded answers"):
        rescore([])
    with pytest.raises(DataError, match="row 2: the gold answer is 'yes'; allowed is one of A, B"):
        rescore(answers(("A", "A"), ("yes", "yes")))
    with pytest.raises(DataError, match="row 1: the gold answer is 'A'; allowed is one of yes"):
        rescore(answers(("A", "A")), get_benchmark("pubmedqa").labels)


# --- Result files ---------------------------------------------------------------------------------


def test_result_files_have_the_published_names_and_text(tmp_path: Path) -> None:
    assert result_names("medqa", "fl") == ("generation_medqa_fl.jsonl", "acc_medqa_fl.txt")
    path = tmp_path / "acc.txt"
    write_accuracy(path, rescore(answers(("A", "A"), ("A", "B"), ("A", "C"))))
    assert path.read_bytes() == b"Accuracy: 0.3333333333333333. "


def test_generations_are_one_array_on_one_line_in_pandas_own_spelling(tmp_path: Path) -> None:
    import pandas as pd  # type: ignore[import-untyped]

    record = Generation('a/b "c" \\ \t\n\u2028 \x1f < é 😀', "A", "")
    path = tmp_path / "generations.jsonl"
    write_generations(path, [record, record])
    frame = pd.DataFrame([vars(record), vars(record)])
    assert path.read_text() == frame.to_json(orient="records")
    assert "\n" not in path.read_text()
    assert read_generations(path) == (record, record)


def test_generations_may_also_be_one_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    rows = [{"prompt": "p", "gold": "A", "output": f"{i}", "more": 1} for i in range(2)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [record.output for record in read_generations(path)] == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"prompt": "p", "gold": "A", "output": null}]', "row 1: 'output' is None"),
        ('[{"prompt": "p", "output": "A"}]', "row 1: 'gold' is None"),
        ("[1]", "row 1: 1 is not a JSON object"),
        ("[", "not valid JSON"),
    ],
)
def test_a_generation_that_lacks_a_text_is_named(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_generations(path)


@pytest.mark.parametrize("name", ["none.jsonl", "damaged.jsonl.gz"])
def test_a_generation_file_that_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="the recorded answers cannot be read"):
        read_generations(tmp_path / name)


def test_every_benchmark_has_prompts_of_this_protocol() -> None:
    for benchmark in benchmarks().values():
        assert benchmark.instruction
        assert len(prompt_hash(benchmark)) == 16
