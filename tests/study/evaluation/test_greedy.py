"""Answers in a model's own words: SQuAD's scores, and the held-out rows of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grandrounds.data.examples import Example
from grandrounds.data.tokenization import tokenize_examples
from grandrounds.errors import ConfigError, DataError
from grandrounds.server.directory import find_checkpoint
from grandrounds.site.local_data import site_of
from grandrounds.study.evaluation.answers import AnswerFile
from grandrounds.study.evaluation.benchmarks import Questions
from grandrounds.study.evaluation.greedy import (
    differs_in_numbers,
    exact_match,
    token_f1,
    tokenized,
)
from grandrounds.study.evaluation.held_out import held_out_item, load_held_out
from grandrounds.study.evaluation.questions import Wanted, questions_for
from grandrounds.study.evaluation.runner import evaluate
from grandrounds.study.evaluation.tables import notes, tables
from grandrounds.study.evaluation.tasks import EvaluationTasks, Method, OfRun, find_target
from grandrounds.study.evaluation.verification import faults_in
from grandrounds.study.export import export
from tests.runs import copy_of, play, read_json

HELD_OUT_ROWS = 76
"""Of the fixture's four sites, 19 each."""


# --- Scores, worked out by hand -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "f1", "exact"),
    [
        ("Rest, and tea.", "rest and the TEA", 1.0, True),  # case, punctuation and articles
        ("rest and tea", "rest", 0.5, False),  # precision 1, recall 1/3: 2 / (3 + 1)
        ("rest rest tea", "rest tea tea", 2 / 3, False),  # rest and tea count once each
        ("tea rest", "rest tea", 1.0, False),  # the order counts for exact match only
        ("an", "the", 1.0, True),  # no words on either side
        ("the", "rest", 0.0, False),
        ("rest", "", 0.0, False),
        ("theatre", "the atre", 0.0, False),  # an article is a whole word
    ],
)
def test_scores_are_squads(reference: str, answer: str, f1: float, exact: bool) -> None:
    assert token_f1(reference, answer) == pytest.approx(f1)
    assert exact_match(reference, answer) == exact


def test_a_match_with_other_numbers_is_recognised() -> None:
    assert exact_match("15 mg", "1.5 mg")  # SQuAD's rule removes the decimal point
    assert differs_in_numbers("15 mg", "1.5 mg")
    assert not differs_in_numbers("1.5 mg", "1.5 mg.")
    assert not differs_in_numbers("15 mg", "16 mg")  # no match in the first place


# --- Held-out rows --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of the embedded base on the formulary."""
    return copy_of("finished", tmp_path)


def of(run: Path) -> OfRun:
    found = find_target(str(run)).run
    assert found is not None
    return found


def test_the_rows_are_those_that_no_site_trained_on_and_sites_take_turns(run: Path) -> None:
    mine = of(run)
    task = load_held_out(mine.directory, mine.config)
    assert len(task.items) == HELD_OUT_ROWS == task.benchmark.expected_items
    sites = [site_of(mine.config, k) for k in range(4)]
    assert sum(len(site.held_out) for site in sites) == HELD_OUT_ROWS
    limited = load_held_out(mine.directory, mine.config, limit=8)
    assert limited.items == task.items[:8]
    own = [{e.input_ids[: e.prompt_tokens] for e in site.held_out} for site in sites]
    from grandrounds.data.tokenization import prompt_token_ids
    from grandrounds.model.tokenizers import tokenizer_of

    asked = prompt_token_ids(
        tokenizer_of("formulary"), "alpaca", [item.question for item in limited.items]
    )
    for turn, prompt in enumerate(asked):
        assert tuple(prompt) in own[turn % 4]


def test_rows_are_asked_in_the_prompt_of_training(tiny_base: Path) -> None:
    """With the instruction apart where the template shows it, and after what was said before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    told = (("system", "Be brief."),)
    examples = [
        Example("Explain. Fever", "Warmth.", (), ("Explain.", "Fever")),
        Example("Why?", "So.", told),
    ]
    template = (
        "{% if system %}<{{ system }}>{% endif %}{% if instruction %}[{{ instruction }}]"
        "{% endif %}{{ question }}: {{ answer }}"
    )
    asked = tokenized([held_out_item(0, e) for e in examples], tokenizer, template, 500)
    assert asked == list(tokenize_examples(examples, tokenizer, template, 500).examples)
    assert asked[1] is not None
    assert tokenizer.decode(asked[1].input_ids) == "<Be brief.>Why?: So.<eos>"


def test_the_loss_is_the_held_out_loss_of_the_sites(run: Path, tmp_path: Path) -> None:
    """The same sum over the same tokens as `training.held_out_loss`, up to rounding."""
    from grandrounds.model.base import BaseSpec
    from grandrounds.model.loss import Forward
    from grandrounds.site.training import held_out_loss
    from grandrounds.study.evaluation.models import Models

    target = find_target(str(run))
    mine = of(run)
    questions = questions_for(target, Wanted(names=["held-out"]))
    method = Method(answer_tokens=1, batch_size=32)
    content = evaluate(EvaluationTasks(target, questions, method, tmp_path / "out"))
    rows = {row["model"]: row for row in content["rows"]}
    assert content["protocol"] == "greedy"
    models = Models(BaseSpec("formulary", 0, "auto"), target.subjects)
    for subject in target.subjects:
        total = tokens = 0.0
        with models.asked(subject) as model:
            for k in range(4):
                held_out = site_of(mine.config, k).held_out
                nll, count = held_out_loss(
                    model, held_out, 16, 0, Forward(False, False, True, 1024)
                )
                total, tokens = total + nll, tokens + count
        loss = rows[subject.name]["loss"]
        assert loss["tokens"] == tokens
        assert loss["nats_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert rows["base"]["cut"] == HELD_OUT_ROWS  # one token is no answer
    assert faults_in(content) == []


def test_a_model_that_learned_the_rows_by_heart_matches_them_and_the_table_tells(
    federation: dict[str, Any], tmp_path: Path
) -> None:
    """All rows of the one site ask and answer alike, so that held-out answers are known too."""
    rows = [{"input": f"What helps patient {i}?", "output": "Rest."} for i in range(40)]
    cards = tmp_path / "cards.jsonl"
    cards.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "static.dataset.name": str(cards),
        "data.num-partitions": 1,
        "data.held-out-fraction": 0.25,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 1.0,
        "num-server-rounds": 2,
        "train.learning-rate-max": 0.05,
        "train.training-arguments.max-steps": 20,
        "model.lora.target-modules": "all-linear",
        "run-directory": str(tmp_path / "run"),
    }
    run = play({**federation, **changes})
    target = find_target(str(run))
    assert target.benchmarks == ("held-out",)  # what a run on a local file is asked by default
    tasks = EvaluationTasks(target, questions_for(target, Wanted(limit=8)))
    content = evaluate(tasks)
    base, tuned = content["rows"][0], content["rows"][-1]
    assert (base["correct"], tuned["correct"], tuned["n"]) == (0, 8, 8)
    assert (tuned["f1"]["mean"], tuned["f1"]["interval"]) == (1.0, None)  # all alike: no interval
    assert tuned["f1"]["vs_base"]["difference"] == pytest.approx(1 - base["f1"]["mean"])
    assert tuned["vs_base"]["p_value"] == pytest.approx(2 / 2**8)  # eight of eight, two-sided
    assert tuned["cut"] == 0
    assert tuned["limited"]
    assert tuned["expected"] == 10
    assert faults_in(content) == []
    exact, f1 = tables(content)
    assert exact.title == "exact match, protocol greedy"
    assert [row[2] for row in exact.rows][-1] == "8/8"
    assert [row[2] for row in f1.rows][-1] == "100.0"
    assert any("its 1 sites did not train on" in note for note in notes(content))
    card = (export(find_checkpoint(run), to=tmp_path / "out") / "README.md").read_text()
    assert "| token F1, % | 95 % interval |" in card
    assert (
        "| tuned | 8/8 | 100.0 | 67.6 to 100.0 | 100.0 |  |" in card
    )  # Wilson's of eight in eight
    assert "    - type: f1\n      value: 1.0000\n" in card
    cards.write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    with pytest.raises(DataError, match="has changed since the run: site 0 had 40 rows and has 30"):
        questions_for(target, Wanted())


def test_rows_that_are_at_the_sites_are_refused_in_one_sentence(run: Path) -> None:
    sites = read_json(run / "sites.json")
    (run / "sites.json").write_text(json.dumps([{**s, "base-content": "x"} for s in sites]))
    with pytest.raises(
        ConfigError, match="its held-out rows are at the sites, and this machine has none"
    ):
        questions_for(find_target(str(run)), Wanted(names=["held-out"]))


def test_held_out_rows_need_a_run(run: Path) -> None:
    with pytest.raises(ConfigError, match="give a run directory, or one of its checkpoints"):
        questions_for(find_target("none", "formulary"), Wanted(names=["held-out"]))
    checkpoint = find_target(str(run / "peft_2"))
    asked = questions_for(checkpoint, Wanted(names=["held-out"], limit=4))
    assert isinstance(asked, Questions)
    assert len(asked.tasks[0].items) == 4


def test_impossible_figures_of_own_words_are_found(run: Path, tmp_path: Path) -> None:
    target = find_target(str(run))
    questions = questions_for(target, Wanted(names=["held-out"], limit=4))
    method = Method(answer_tokens=4)
    content = evaluate(EvaluationTasks(target, questions, method, tmp_path / "out"))
    assert faults_in(content) == []
    answers = AnswerFile(tmp_path / "out" / "answers_base_held-out_greedy.jsonl").ordered()
    assert len(answers) == 4
    for change, said in [
        ({"f1": {"mean": 1.5, "interval": None}}, "'f1' has the mean 1.5"),
        ({"f1": {"mean": 0.5, "interval": [0.6, 0.7]}}, "mean F1 0.5 outside its interval"),
        ({"loss": {"nats_per_token": -1.0, "tokens": 40}}, "'loss' has -1.0 nats per token"),
        ({"loss": {"nats_per_token": 1.0, "tokens": 3}}, "at least one token of each item"),
        ({"cut": 5}, "'cut' is 5, and must be a count of at most 4"),
        ({"expected": 3}, "4 items, but the benchmark has 3"),
        ({"prompt_hash": "0" * 16}, "other prompts were sent"),
        (
            {"correct": 4, "accuracy": 1.0, "interval": [0.5101, 1.0]},
            "exact matches have an F1 of 1",
        ),
    ]:
        changed = {**content, "rows": [{**content["rows"][0], **change}, *content["rows"][1:]]}
        assert any(said in fault for fault in faults_in(changed)), said
