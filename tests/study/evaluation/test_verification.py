"""What cannot be in an `evaluation.json` is found, and a sound one passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from grandrounds.statistics import wilson_interval
from grandrounds.study.evaluation.benchmarks import get_benchmark
from grandrounds.study.evaluation.flowertune import prompt_hash
from grandrounds.study.evaluation.verification import faults_in, published_percentage_is_possible


def make_row(model: str, benchmark: str, correct: int, n: int | None = None) -> dict[str, Any]:
    items = n or get_benchmark(benchmark).expected_items
    return {
        "model": model,
        "benchmark": benchmark,
        "n": items,
        "correct": correct,
        "accuracy": correct / items,
        "interval": list(wilson_interval(correct, items)),
        "prompt_hash": prompt_hash(get_benchmark(benchmark)),
        "source": {"file": f"{benchmark}.jsonl", "sha256": "0" * 64},
        "format_failures": 10,
        "spread": {"A": items - 10, "other": 10},
    }


def averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an evaluation with the averages of its rows."""
    average = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        average[model] = {
            "accuracy": math.fsum(row["accuracy"] for row in own) / len(own),
            "benchmarks": [row["benchmark"] for row in own],
        }
    return {
        "protocol": "flowertune",
        "base": "some/base",
        "adapter": "run/peft_10",
        "adapter_sha256": "1" * 64,
        "precision": "float32",
        "versions": {"torch": "2"},
        "rows": rows,
        "average": average,
    }


@pytest.fixture
def sound() -> dict[str, Any]:
    """Base and tuned model on two whole benchmarks."""
    rows = [
        make_row("base", "pubmedqa", 223),
        make_row("base", "medmcqa", 1634),
        make_row("tuned", "pubmedqa", 341),
        make_row("tuned", "medmcqa", 2390),
    ]
    return averaged(rows)


def only_fault(evaluation: Any) -> str:
    faults = faults_in(evaluation)
    assert len(faults) == 1, faults
    return faults[0]


# --- Percentages ----------------------------------------------------------------------------------


def test_the_published_68_34_percent_of_4183_cannot_be() -> None:
    """2,858 / 4,183 = 68.3242 % and 2,859 / 4,183 = 68.3481 %: rounded, 68.32 and 68.35."""
    assert not published_percentage_is_possible(68.34, 2, 4183)
    assert published_percentage_is_possible(68.32, 2, 4183)
    assert published_percentage_is_possible(68.35, 2, 4183)
    assert published_percentage_is_possible(68.3, 1, 4183)


@pytest.mark.parametrize("decimals", [0, 1, 2, 4])
@pytest.mark.parametrize("n", [3, 128, 500, 1273])
def test_every_rounded_count_is_possible(decimals: int, n: int) -> None:
    for count in range(n + 1):
        assert published_percentage_is_possible(round(100 * count / n, decimals), decimals, n)


def test_as_many_two_decimal_figures_are_possible_as_counts_give() -> None:
    """Of 500 items each count is a multiple of 0.2 %, so that 501 of 10,001 figures can be."""
    figures = [hundredths / 100 for hundredths in range(10001)]
    assert sum(published_percentage_is_possible(figure, 2, 500) for figure in figures) == 501


def test_a_half_may_be_rounded_up_or_down() -> None:
    """1 / 8 is 12.5 %."""
    assert published_percentage_is_possible(12, 0, 8)
    assert published_percentage_is_possible(13, 0, 8)
    assert not published_percentage_is_possible(14, 0, 8)


def test_nothing_outside_zero_to_a_hundred_percent_is_possible() -> None:
    assert not published_percentage_is_possible(-0.2, 1, 500)
    assert not published_percentage_is_possible(100.2, 1, 500)


@pytest.mark.parametrize(
    ("percentage", "decimals", "n"), [(50.0, 1, 0), (50.0, -1, 5), (math.nan, 1, 5)]
)
def test_a_percentage_of_nothing_is_refused(percentage: float, decimals: int, n: int) -> None:
    with pytest.raises(ValueError, match="no percentage"):
        published_percentage_is_possible(percentage, decimals, n)


# --- Evaluations ----------------------------------------------------------------------------------


def test_a_sound_evaluation_passes(sound: dict[str, Any]) -> None:
    assert faults_in(sound) == []


def test_figures_rounded_in_writing_pass(sound: dict[str, Any]) -> None:
    for row in sound["rows"]:
        row["accuracy"] = round(row["accuracy"], 4)
        row["interval"] = [round(bound, 4) for bound in row["interval"]]
    for average in sound["average"].values():
        average["accuracy"] = round(average["accuracy"], 4)
    assert faults_in(sound) == []


def test_an_accuracy_that_no_count_gives_is_found(sound: dict[str, Any]) -> None:
    sound["rows"][3]["accuracy"] = 0.6834
    faults = faults_in(sound)
    assert faults == [
        "row 4 (tuned, medmcqa): accuracy 0.6834, but 2390 of 4183 is 0.571360",
        "row 4 (tuned, medmcqa): no count of 4183 items gives 68.34 %",
    ]


def test_an_accuracy_of_another_count_is_found(sound: dict[str, Any]) -> None:
    sound["rows"][0]["accuracy"] = 0.448
    assert only_fault(sound) == "row 1 (base, pubmedqa): accuracy 0.448, but 223 of 500 is 0.446000"


def test_more_correct_than_asked_is_found(sound: dict[str, Any]) -> None:
    sound["rows"][0]["correct"] = 501
    assert "row 1 (base, pubmedqa): 501 of 500 items correct" in faults_in(sound)


def test_an_interval_of_other_counts_is_found(sound: dict[str, Any]) -> None:
    sound["rows"][0]["interval"] = [0.43, 0.46]
    assert "Wilson's 95 % interval of 223 of 500 is [0.40" in only_fault(sound)


def test_a_spread_or_failures_beyond_the_items_are_found(sound: dict[str, Any]) -> None:
    sound["rows"][0]["spread"]["A"] += 1
    sound["rows"][1]["format_failures"] = 4184
    faults = faults_in(sound)
    assert len(faults) == 2
    assert "does not sum to 500 items" in faults[0]
    assert "4184 format failures among 4183 items" in faults[1]


def test_fewer_items_than_published_must_be_declared(sound: dict[str, Any]) -> None:
    row = make_row("base", "pubmedqa", 150, n=300)
    rows = [row, *sound["rows"][1:]]
    assert only_fault(averaged(rows)).endswith(
        "300 items instead of 500, and not declared as limited"
    )
    row["limited"] = True
    assert faults_in(averaged(rows)) == []


def test_more_items_than_published_are_found_even_if_declared(sound: dict[str, Any]) -> None:
    row = {**make_row("base", "pubmedqa", 300, n=1000), "limited": True}
    fault = only_fault(averaged([row, *sound["rows"][1:]]))
    assert fault.endswith("1000 items, but the benchmark has 500")


def test_an_unknown_benchmark_suggests_the_nearest(sound: dict[str, Any]) -> None:
    for row in sound["rows"][::2]:
        row["benchmark"] = "pubmed_qa"
    faults = faults_in(averaged(sound["rows"]))
    assert len(faults) == 2
    assert "Did you mean 'pubmedqa'?" in faults[0]


def test_prompts_of_another_protocol_are_found(sound: dict[str, Any]) -> None:
    sound["rows"][1]["prompt_hash"] = prompt_hash(get_benchmark("medqa"))
    assert "other prompts were sent" in only_fault(sound)
    sound["rows"][1].pop("prompt_hash")
    assert "prompt hash None" in only_fault(sound)


def test_equal_columns_are_found() -> None:
    """No two sizes of the published benchmarks allow it: 500 and 1,273 have no common divisor."""
    rows = [
        {**make_row(model, name, correct, n=1000), "limited": True}
        for model, correct in (("base", 400), ("tuned", 512))
        for name in ("medqa", "medmcqa")
    ]
    fault = only_fault(averaged(rows))
    assert fault == "medqa and medmcqa have the same figures for every model: one may be a copy"


def test_a_tuned_model_with_all_figures_of_the_base_is_found(sound: dict[str, Any]) -> None:
    rows = sound["rows"][:2] + [{**row, "model": "tuned"} for row in sound["rows"][:2]]
    assert only_fault(averaged(rows)) == (
        "tuned has the base's figures on every benchmark: was its adapter loaded?"
    )


def test_equal_figures_of_few_items_or_of_no_right_answer_are_no_fault() -> None:
    for n, correct in ((20, 10), (400, 0)):
        rows = [
            {**make_row(model, name, correct, n=n), "limited": True}
            for model in ("base", "tuned")
            for name in ("medqa", "medmcqa")
        ]
        assert faults_in(averaged(rows)) == []


def test_a_missing_base_and_a_doubled_row_are_found(sound: dict[str, Any]) -> None:
    tuned = sound["rows"][2:]
    assert "no row for the base" in only_fault(averaged(tuned))
    doubled = copy.deepcopy(sound)
    doubled["rows"].append(doubled["rows"][0])
    assert only_fault(doubled) == "base has two rows for pubmedqa"


def test_an_average_that_is_not_the_mean_of_its_rows_is_found(sound: dict[str, Any]) -> None:
    sound["average"]["tuned"]["accuracy"] += 0.01
    assert "average of tuned is 0.63" in only_fault(sound)
    assert "over pubmedqa, medmcqa it is 0.626680" in only_fault(sound)


def test_an_average_over_some_of_the_rows_is_no_fault(sound: dict[str, Any]) -> None:
    sound["average"]["tuned"] = {"accuracy": 341 / 500, "benchmarks": ["pubmedqa"]}
    assert faults_in(sound) == []


@pytest.mark.parametrize(
    ("average", "told"),
    [
        (None, "'average' must map each model"),
        ({"base": 0.4}, "'accuracy' must be a number"),
        ({"base": {"accuracy": 0.4, "benchmarks": ["medqa"]}}, "over ['medqa']"),
        ({"base": {"accuracy": 0.4, "benchmarks": []}}, "over []"),
        ({}, "no average for base"),
    ],
)
def test_an_average_that_cannot_be_checked_is_found(
    average: Any, told: str, sound: dict[str, Any]
) -> None:
    assert any(told in fault for fault in faults_in({**sound, "average": average}))


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ([], "must map each tuned model"),
        ({"other": {"adapter_sha256": "1"}}, "tuned has rows, but 'models' has other only"),
        ({"tuned": {}}, "not the 'adapter_sha256' of its weights"),
    ],
)
def test_models_that_are_not_those_of_the_rows_are_found(
    sound: dict[str, Any], models: Any, told: str
) -> None:
    assert told in only_fault({**sound, "models": models})
    assert not faults_in({**sound, "models": {"tuned": {"adapter_sha256": "1"}}})


@pytest.mark.parametrize("evaluation", [{}, [], None, {"rows": []}, {"rows": "no"}])
def test_an_evaluation_without_rows_is_told(evaluation: Any) -> None:
    assert "no rows" in only_fault(evaluation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("benchmark", 3),
        ("n", 0),
        ("n", 500.0),
        ("n", True),
        ("correct", -1),
        ("accuracy", 44.6),
        ("accuracy", math.nan),
        ("interval", None),
        ("interval", [0.1, 2]),
        ("spread", [1]),
    ],
)
def test_a_malformed_row_is_told_and_the_others_are_still_checked(
    key: str, value: Any, sound: dict[str, Any]
) -> None:
    sound["rows"][0][key] = value
    sound["rows"][3]["correct"] += 1
    faults = faults_in(sound)
    assert any(fault.startswith(f"row 1: '{key}'") for fault in faults)
    assert any(fault.startswith("row 4 (tuned, medmcqa): accuracy") for fault in faults)
