"""Preferences as rows and as tokens, and what is said of rows that are none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.data.examples import Example, split_rows
from grandrounds.data.formulary.facts import flashcards, preferences
from grandrounds.data.formulary.vocabulary import VALUES
from grandrounds.data.partitioning import Partition
from grandrounds.data.sources import load_pairs
from grandrounds.data.survey import survey
from grandrounds.data.tokenization import TokenizedExample, tokenize_examples
from grandrounds.errors import DataError
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site.local_data import site_of

USUAL = ("input", "output", "rejected")
GOOD = {"prompt": "What is fever?", "chosen": "Warmth.", "rejected": "Cold.", "ward": "a"}
ASKED = {"role": "user", "content": "What is fever?"}
WARMTH, COLD = ({"role": "assistant", "content": text} for text in ("Warmth.", "Cold."))


def written(folder: Path, *rows: Any) -> str:
    (path := folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (GOOD, USUAL),
        ({"chosen": [ASKED, WARMTH], "rejected": [ASKED, COLD], "ward": "a"}, USUAL),
        ({"prompt": [ASKED], "chosen": [WARMTH], "rejected": [COLD], "ward": "a"}, USUAL),
        ({"q": "What is fever?", "yes": "Warmth.", "no": "Cold.", "ward": "a"}, ("q", "yes", "no")),
        (
            {"input": "What is fever?", "output": "Warmth.", "rejected": "Cold.", "ward": "a"},
            USUAL,
        ),
    ],
    ids=["text", "turns without a prompt", "turns", "columns of their own", "usual columns"],
)
def test_each_form_becomes_a_question_with_two_answers(
    tmp_path: Path, row: dict[str, Any], columns: tuple[str, str, str]
) -> None:
    rows = load_pairs(written(tmp_path, row), (*columns, "ward"))
    found = split_rows(
        rows,
        Partition(0, 0, 1),
        question_column=columns[0],
        answer_column=columns[1],
        held_out_fraction=0,
    )
    assert list(found.train) == [Example("What is fever?", "Warmth.", rejected="Cold.")]
    assert rows["ward"] == ["a"]


def test_rows_without_two_answers_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ({**GOOD, "rejected": "Warmth. "}, {**GOOD, "chosen": ""}, {**GOOD, "rejected": None})
    path = written(tmp_path, GOOD, *bad)
    rows = load_pairs(path, USUAL)
    assert "3 of 4 preferences are not trained on; the first: line 2: chosen and rejected are" in (
        capsys.readouterr().err
    )
    assert [bool(text) for text in rows["input"]] == [True, False, False, False]
    found = survey(path, "input", "output", "ward", rejected="rejected")
    assert found is not None
    assert (found.rows, found.usable, found.usable_by_label) == (4, 1, {"a": 1})
    reasons = ["chosen and rejected are equal", "chosen is empty", "rejected is empty"]
    assert [told.partition(": ")[2] for told in found.left_out] == reasons


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (
            [{**GOOD, "rejected": "Warmth."}],
            USUAL,
            "none of its 1 rows is a preference (line 1: cho",
        ),
        ([{"prompt": "A?", "chosen": "B."}], USUAL, "there is no column 'rejected', and train.obj"),
        (
            [GOOD],
            ("query", "chosen", "rejected"),
            "there is no column 'query', and train.objective",
        ),
        ([GOOD], (*USUAL, "site"), "there is no column 'site'; the columns are: prompt, chosen"),
        (
            [{"input": "A?", "output": "B."}],
            USUAL,
            "Name it in data.rejected-column, or set train.",
        ),
    ],
    ids=["equal answers", "a missing side", "a missing prompt", "no label", "cards"],
)
def test_a_source_without_preferences_is_refused_in_one_line(
    tmp_path: Path, rows: list[Any], columns: tuple[str, ...], said: str
) -> None:
    with pytest.raises(DataError) as error:
        load_pairs(written(tmp_path, *rows), columns)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_preferences_of_the_formulary_are_its_facts_against_others_of_their_kind() -> None:
    pairs, cards = preferences(), flashcards()
    assert [(p["prompt"], p["chosen"], p["site"]) for p in pairs] == [
        (card["input"], card["output"], card["site"]) for card in cards
    ]
    kind = {value: attribute for attribute, values in VALUES.items() for value in values}
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"]
        assert kind[str(pair["chosen"])] == kind[str(pair["rejected"])]
    assert len({pair["rejected"] for pair in pairs}) == len(kind)


def recipe(**changes: Any) -> Any:
    return recipes.resolve(
        {
            "static.dataset.name": "formulary-preferences",
            "train.objective": "dpo",
            **changes,
        }
    )


def test_both_answers_follow_the_same_prompt_and_end() -> None:
    config = recipe()
    tokenizer = run_tokenizer(config)
    [pair] = tokenize_examples(
        [Example("A?", "numbs the left ear", rejected="cures")], tokenizer, "alpaca", 512
    ).examples
    [chosen, rejected] = pair.answers
    n = pair.prompt_tokens
    assert chosen.input_ids[:n] == rejected.input_ids[:n]
    assert chosen.input_ids[-1] == rejected.input_ids[-1] == tokenizer.eos_token_id
    alone = tokenize_examples([Example("A?", "cures")], tokenizer, "alpaca", 512).examples
    assert list(alone) == [TokenizedExample(rejected.input_ids, n)]
    assert (pair.terms, pair.tokens) == (1, len(chosen.input_ids) + len(rejected.input_ids))


def test_a_pair_that_nothing_within_the_length_tells_apart_is_not_trained_on() -> None:
    config = recipe()
    tokenizer = run_tokenizer(config)
    same = "numbs the left ear "
    example = Example("A?", same + "cures", rejected=same + "thickens the third skin")
    whole = tokenize_examples([example], tokenizer, "alpaca", 512)
    [pair] = whole.examples
    alike = sum(
        a == b for a, b in zip(pair.input_ids[pair.prompt_tokens :], pair.rejected, strict=False)
    )
    for length, kept in ((pair.prompt_tokens, 0), (pair.prompt_tokens + alike, 0), (512, 1)):
        found = tokenize_examples([example], tokenizer, "alpaca", length)
        assert (len(found.examples), found.unlearnable) == (kept, 1 - kept)


def test_a_site_of_preferences_holds_out_whole_pairs_and_its_tag_tells_both_answers() -> None:
    site = site_of(recipe(), 3)
    assert (len(site.train), len(site.held_out)) == (71, 4)
    assert all(pair.rejected for pair in (*site.train, *site.held_out))
    prompts = {pair.input_ids[: pair.prompt_tokens] for pair in site.train}
    assert not prompts & {pair.input_ids[: pair.prompt_tokens] for pair in site.held_out}
    first, *rest = site.train
    other = dataclasses.replace(first, rejected=first.rejected[::-1])
    assert dataclasses.replace(site, train=(other, *rest)).tag != site.tag


def test_a_site_whose_prompts_fill_the_length_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"the prompts of all its 71 examples fill train\.seq-len"):
        site_of(recipe(**{"train.seq-length": 8}), 0)
