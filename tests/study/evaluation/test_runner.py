"""An evaluation of a tiny base and an adapter: rows, files, tables and notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from grandrounds.statistics import wilson_interval
from grandrounds.study.evaluation import flowertune, likelihood, runner
from grandrounds.study.evaluation.answers import AnswerFile
from grandrounds.study.evaluation.tables import notes, tables
from grandrounds.study.evaluation.verification import evaluations_in, faults_in
from tests.study.evaluation.small import (
    MEDMCQA,
    PUBMEDQA,
    evaluate_target,
    medmcqa_rows,
    write_lines,
)


def test_every_model_and_benchmark_has_a_row_with_counts_and_the_base_comes_first(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    evaluation = ask(adapter, protocol="likelihood")
    rows = evaluation["rows"]
    assert [(row["model"], row["benchmark"], row["n"]) for row in rows] == [
        ("base", "medmcqa", MEDMCQA),
        ("tuned", "medmcqa", MEDMCQA),
        ("base", "pubmedqa", PUBMEDQA),
        ("tuned", "pubmedqa", PUBMEDQA),
    ]
    for row in rows:
        assert row["accuracy"] == row["correct"] / row["n"]
        assert tuple(row["interval"]) == wilson_interval(row["correct"], row["n"])
        assert (row["vs_base"] is None) == (row["model"] == "base")
        assert row["limited"]
    gained = rows[1]["vs_base"]
    assert gained["only_model"] - gained["only_base"] == rows[1]["correct"] - rows[0]["correct"]
    assert gained["difference"] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])
    assert len(evaluation["adapter_sha256"]) == 64
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation
    assert faults_in(evaluation) == []


def test_the_base_row_is_that_of_a_model_that_never_had_an_adapter(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    ask(adapter, protocol="likelihood", permutations=1)
    ask(protocol="likelihood", permutations=1, out=tmp_path / "alone")
    name = "answers_base_medmcqa_likelihood.jsonl"
    beside, alone = (AnswerFile(tmp_path / folder / name).records for folder in ("out", "alone"))
    tuned = AnswerFile(tmp_path / "out" / name.replace("base", "tuned")).records
    assert beside.keys() == alone.keys()
    for key, record in alone.items():
        assert beside[key]["log_likelihoods"] == pytest.approx(record["log_likelihoods"], abs=1e-5)
        assert tuned[key]["log_likelihoods"] != pytest.approx(record["log_likelihoods"], abs=1e-2)


def test_a_tuned_row_is_that_of_plain_peft(
    ask: Callable[..., dict[str, Any]], adapter: Path, tiny_base: Path, tmp_path: Path, data: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grandrounds.study.evaluation.benchmarks import get_benchmark, load_items

    ask(adapter, benchmarks=["medmcqa"], permutations=0)
    benchmark = get_benchmark("medmcqa")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    items = load_items(benchmark, data)
    expected = likelihood.answer_items(model, tokenizer, benchmark, items)
    found = AnswerFile(tmp_path / "out" / "answers_tuned_medmcqa_likelihood.jsonl").ordered()
    for record, answer in zip(found, expected, strict=True):
        assert record["log_likelihoods"] == pytest.approx(answer.log_likelihoods, abs=1e-4)


def test_the_base_is_loaded_once_for_all_models(
    ask: Callable[..., dict[str, Any]], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grandrounds.model import resident as model
    from grandrounds.model.base import base_loads

    monkeypatch.setattr(model, "_resident", None)
    before = base_loads()
    ask(adapter, protocol="all", permutations=1)
    assert base_loads() == before + 1


def test_likelihood_rows_tell_shuffling_and_position_bias_for_letters_only(
    ask: Callable[..., dict[str, Any]],
) -> None:
    letters, words = ask(permutations=2)["rows"]
    assert len(letters["shuffled"]["correct"]) == 2
    assert letters["shuffled"]["n"] == MEDMCQA
    assert sum(letters["position_bias"]["counts"]) == 2 * MEDMCQA
    assert letters["normalised"]["correct"] == letters["correct"]  # letters have one length
    assert words["shuffled"] is None
    assert words["position_bias"] is None


def test_flowertune_rows_tell_form_and_spread_and_leave_flowertunes_files(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    rows = ask(adapter, protocol="flowertune")["rows"]
    for row in rows:
        assert sum(row["spread"].values()) == row["n"]
        assert 0 <= row["format_failures"] <= row["n"]
        names = flowertune.result_names(row["benchmark"], row["model"])
        records = flowertune.read_generations(tmp_path / "out" / names[0])
        score = flowertune.rescore(records)
        assert (score.correct, score.n) == (row["correct"], row["n"])
        line = (tmp_path / "out" / names[1]).read_text()
        assert line == flowertune.accuracy_line(score)


def test_all_protocols_are_one_file_and_each_verifies(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    content = ask(protocol="all", permutations=1)
    assert [e["protocol"] for e in evaluations_in(content)] == ["flowertune", "likelihood"]
    assert faults_in(content) == []
    content["evaluations"][1]["rows"][0]["correct"] += 1
    assert any("protocol likelihood: row 1" in fault for fault in faults_in(content))


def test_what_a_batch_computes_together_changes_no_answer(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """FlowerTune's answer length follows its own batches of 16, not ours."""
    one = ask(protocol="all", batch_size=1, permutations=1)
    many = ask(protocol="all", batch_size=16, permutations=1, out=tmp_path / "many")
    counts = [
        [(row["benchmark"], row["correct"], row.get("spread")) for row in evaluation["rows"]]
        for content in (one, many)
        for evaluation in evaluations_in(content)
    ]
    assert counts[:2] == counts[2:]
    name = "generation_medmcqa_base.jsonl"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_orders_asked_together_are_answered_as_one_by_one(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a question is read once for all orders of its options; here it is made to be."""
    apart = ask(protocol="all", batch_size=None, permutations=3)
    monkeypatch.setattr(runner, "fills_passes", lambda method: True)
    told = Told()
    together = ask(
        protocol="all", batch_size=None, permutations=3, out=tmp_path / "together", listener=told
    )
    name = "answers_base_medmcqa_likelihood.jsonl"
    one, other = (AnswerFile(tmp_path / folder / name).records for folder in ("out", "together"))
    assert list(one)[:2] == [(0, row) for _, row in list(one)[:2]]  # an order at a time
    assert [order for order, _ in list(other)[:4]] == [0, 1, 2, 3]
    assert one.keys() == other.keys()
    for key, record in one.items():
        assert other[key]["choice"] == record["choice"]
        assert other[key]["log_likelihoods"] == pytest.approx(record["log_likelihoods"], abs=1e-4)
    for before, after in zip(evaluations_in(apart), evaluations_in(together), strict=True):
        assert [row["correct"] for row in after["rows"]] == [
            row["correct"] for row in before["rows"]
        ]
    assert told.answered == MEDMCQA * (4 + 1) + PUBMEDQA * 2


def test_orders_asked_together_go_on_where_they_stopped(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"benchmarks": ["medmcqa"], "batch_size": None, "permutations": 2}
    whole = ask(**arguments)
    file = tmp_path / "out" / "answers_base_medmcqa_likelihood.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-5]))
    monkeypatch.setattr(runner, "fills_passes", lambda method: True)
    told = Told()
    again = ask(**arguments, resume=True, listener=told)
    assert told.answered == 5
    assert [row["correct"] for row in again["rows"]] == [row["correct"] for row in whole["rows"]]


class Told:
    """A listener that counts answers."""

    answered = 0

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        if event == "answered":
            self.answered += values["count"]


def test_formulary_parts_add_up_and_are_rows_of_the_table(tmp_path: Path) -> None:
    evaluation = evaluate_target("none", base="formulary", limit=8, out=tmp_path / "out")
    (row,) = evaluation["rows"]
    assert [group["group"] for group in row["groups"]] == ["private", "public"]
    assert [group["n"] for group in row["groups"]] == [4, 4]
    assert row["n"] == 8
    cells = tables(evaluation)[0].rows
    assert [line[0] for line in cells] == [
        "Formulary (fictional), private",
        "Formulary (fictional), public",
    ]
    row["groups"][0]["correct"] += 1
    assert any("groups" in fault for fault in faults_in(evaluation))


def test_a_chat_template_cannot_be_verified_and_is_not_held_against_an_evaluation(
    tmp_path: Path,
) -> None:
    evaluation = evaluate_target("none", base="formulary", limit=2, out=tmp_path / "out")
    evaluation["rows"][0]["prompt_hash"] = "of a chat template"
    assert any("other prompts were sent" in fault for fault in faults_in(evaluation))
    evaluation["prompt_template"] = "chat"
    assert faults_in(evaluation) == []


def test_tables_and_notes_say_what_a_reader_must_know(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    evaluation = ask(adapter)
    accuracy = tables(evaluation)[0]
    assert all(len(row) == len(accuracy.columns) for row in accuracy.rows)
    assert [row[0] for row in accuracy.rows[-2:]] == ["average", "average"]
    text = " ".join(notes(evaluation))
    for words in (
        "Wilson",
        "McNemar",
        "Newcombe",
        "test and interval may disagree",
        "Not adjusted for the 2 comparisons",
        "Average: unweighted mean of medmcqa, pubmedqa",
        f"MedMCQA: {MEDMCQA} of 4,183 items",
        "was not checked",
    ):
        assert words in text
    overlap = {"training": "cards.jsonl", "benchmarks": {"medmcqa": {"items": 3, "n": 14}}}
    assert "3 of 14 medmcqa questions occur in cards.jsonl" in " ".join(notes(evaluation, overlap))


def test_a_comparison_over_items_of_one_answer_has_a_note(
    ask: Callable[..., dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    """Over PubMedQA's first 150 rows, all yes, a base had 100 % and a tuned model p = 0.003."""
    row = {"CONTEXTS": ["Tea was drunk."], "final_decision": "yes"}
    rows = [{"QUESTION": f"Is {i} tea?", **row} for i in range(20)]
    write_lines(tmp_path / "pubmedqa.jsonl", rows)
    evaluation = ask(
        adapter, data=tmp_path, benchmarks=["pubmedqa"], limit=12, protocol="likelihood"
    )
    assert evaluation["rows"][0]["largest_answer"] == {"label": "yes", "n": 12}
    text = " ".join(notes(evaluation))
    assert "PubMedQA: 12 of 500 items, a sample with the answers in the proportions" in text
    assert "12 of 12 items is 'yes', so a model that always says it gets 100.0 %" in text
    del evaluation["sample"]
    assert "PubMedQA: 12 of 500 items, the first." in " ".join(notes(evaluation))


@pytest.mark.parametrize("protocol", ["flowertune", "likelihood"])
def test_prompts_longer_than_the_context_are_cut_on_the_left_counted_and_told(
    ask: Callable[..., dict[str, Any]], tmp_path: Path, protocol: str
) -> None:
    rows = medmcqa_rows(3)
    rows[1]["question"] = "fever and cough " * 2000
    write_lines(tmp_path / "medmcqa.jsonl", rows)
    evaluation = ask(
        data=tmp_path, benchmarks=["medmcqa"], protocol=protocol, permutations=0, batch_size=2
    )
    assert evaluation["rows"][0]["truncated"] == 1
    assert (
        "MedMCQA, base: 1 of 3 prompts exceeded the context length and were truncated on the left."
        in notes(evaluation)
    )
