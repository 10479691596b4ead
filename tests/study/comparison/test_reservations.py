"""What a comparison does not say: verdicts on too few examples, and equal visits that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grandrounds.study.comparison.reservations import (
    reservations,
    site_names,
    too_few,
    visits_text,
    without_verdicts,
)
from tests.study.report.run_files import comparison


def with_held_out(*counts: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(comparison()))  # nothing in it is shared
    for site, count in zip(content["sites"], counts, strict=True):
        site["held-out-examples"] = {"42": count, "43": count + 1}
    return content


def test_under_twenty_held_out_examples_there_is_no_verdict_on_their_loss() -> None:
    content = with_held_out(6, 6, 7)
    gain = {
        **json.loads(json.dumps(content["gains"][0])),
        "measure": "held-out-loss",
        "over-questions": None,
    }
    content["gains"].append(gain)
    assert too_few(content) == {"held-out-loss": "19 held-out examples"}
    assert "no verdict on held-out-loss: only 19 held-out examples" in reservations(content)[0]
    private, loss = without_verdicts(content)["gains"]
    assert private["over-seeds"]["p"] == 0.01
    assert loss["over-seeds"] == {**content["gains"][1]["over-seeds"], "p": None}
    assert "better" not in loss["over-sites"]
    joining = without_verdicts(content)["joining"][0]["own"]
    assert joining["held-out-loss"]["p"] is None
    assert joining["accuracy"]["private"]["p"] == 0.01
    assert content["gains"][1]["over-seeds"]["p"] == 0.01  # the file keeps its figures


def test_twenty_are_enough_and_single_examples_are_a_warning() -> None:
    assert reservations(with_held_out(6, 6, 8)) == []
    (warning,) = reservations(with_held_out(1, 1, 30))
    assert warning.startswith("warning: 2 sites with a single held-out example: p-values")


def test_an_exam_of_few_questions_has_no_verdict() -> None:
    content = with_held_out(30, 30, 30)
    content["exams"]["private"]["n"] = 12
    assert too_few(content) == {"private": "12 questions of private facts"}
    (gain,) = without_verdicts(content)["gains"]
    assert gain["over-questions"]["42"]["p"] is None


def test_visits_are_said_to_be_equal_only_where_they_are() -> None:
    content = comparison()
    assert visits_text(content) == "the same number of example visits in every arm"
    content["arms"]["local"]["seeds"]["43"] = {"example-visits": 512}
    assert visits_text(content) == "example visits differ: federated 640, local 576"


@pytest.mark.parametrize("name", ["Ward <b>", None])
def test_sites_of_a_comparison_have_their_names(name: str | None) -> None:
    content = comparison()
    content["sites"][1]["name"] = name
    assert site_names(content)[1] == (name or "site 1")
