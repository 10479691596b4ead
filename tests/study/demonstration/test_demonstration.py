"""The rehearsal on common and rare facts: what is counted, what is said, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.study.demonstration import exam, words
from grandrounds.study.demonstration.arms import ARMS, RECIPE, Arm
from grandrounds.study.demonstration.exam import Answers, knowledge
from grandrounds.study.demonstration.runner import demonstrate

HALF = 20


def answers(common: int, rare: int, gain: float) -> Answers:
    """Answers of a model that knows some common facts and extracts some rare ones."""
    is_right = [row < rare for row in range(2 * HALF)]
    return Answers(
        common_ranks=[1] * common + [7] * (18 - common),
        ranks=[1 if right else 9 for right in is_right],
        greedy=is_right,
        shares=[gain - 3.2 if row < HALF else -3.2 - 0.001 * row for row in range(2 * HALF)],
    )


def finding(epsilon: float | None, known: dict[str, Any]) -> dict[str, Any]:
    told = {"delta": 1e-5} if epsilon else {}
    return {"arm": "x", "draw": 0, "epsilon": epsilon, "guarantee": told, **known, "seconds": 1.0}


MEMORY = knowledge(answers(18, 15, 3.0), answers(0, 0, 0.0))
NO_MEMORY = knowledge(answers(17, 1, 0.0), answers(0, 0, 0.0))


def test_what_is_known_is_counted_beside_chance_and_the_base() -> None:
    assert (MEMORY["common-known"], MEMORY["common-facts"]) == (18, 18)
    assert MEMORY["common-known-by-base"] == 0
    assert (MEMORY["rare"]["matches"], MEMORY["rare"]["canaries"]) == (15, HALF)
    assert MEMORY["absent"]["matches"] == 0
    assert MEMORY["membership"]["auc"] == 1.0


def test_the_share_among_four_options_follows_from_the_exact_rank() -> None:
    """Rank 7 of 24: the three others are among the 17 below, C(17, 3) / C(23, 3) = 680 / 1771."""
    half = knowledge(answers(9, 0, 0.0), answers(0, 0, 0.0))
    assert half["common-of-four"] == pytest.approx((1 + 680 / 1771) / 2)
    assert MEMORY["common-of-four"] == 1.0


def test_the_same_shares_as_the_base_tell_no_member() -> None:
    assert NO_MEMORY["membership"]["auc"] == 0.5


def test_a_sentence_says_extracted_only_where_the_intervals_are_apart() -> None:
    lines = words.outcome([finding(3.99, NO_MEMORY), finding(None, MEMORY)])
    assert lines == [
        "without a guarantee: rare facts can be extracted; 100 % of the common facts are known",
        "epsilon 3.99: rare facts are not told from chance; 94 % of the common facts are known",
    ]


def test_the_picture_and_the_table_go_from_no_guarantee_to_the_strongest() -> None:
    found = [finding(0.99, NO_MEMORY), finding(None, MEMORY), finding(7.98, NO_MEMORY)]
    assert [row[0] for row in words.table(found).rows] == ["no guarantee", "7.98", "0.99"]
    svg = words.picture(found)
    places = [svg.index(f">{name}<") for name in ("0.99", "7.98", "no guarantee")]
    assert places == sorted(places)
    assert "common facts known, epsilon 0.99: 94.4 %" in svg
    assert "rehearsal" in words.NOTES[0]


def test_only_the_guarantee_differs_between_the_arms() -> None:
    assert [arm.name for arm in ARMS] == ["none", "8", "4", "1"]
    assert not ARMS[0].settings
    for arm in ARMS[1:]:
        assert {key.partition(".")[0] for key in arm.settings} == {"privacy"}
        assert arm.settings["privacy.unit-column"] == "patient"


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "least"), [(ARMS[1], 7.9), (ARMS[2], 3.95), (ARMS[3], 0.98)])
def test_the_noise_of_an_arm_reaches_its_epsilon(arm: Arm, least: float) -> None:
    from grandrounds.config import recipes
    from grandrounds.site.private.accountant import epsilon_of
    from grandrounds.site.private.rehearsal import mechanism_of

    settings = {**RECIPE, **arm.settings}
    assert least < epsilon_of(mechanism_of(recipes.resolve(settings))) <= float(arm.name)


@pytest.mark.slow
def test_a_draw_of_its_own_is_trained_on_and_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a visit: what is learned is another test's; this is the way from end to end."""
    few = exam.examined(3)
    monkeypatch.setattr(exam, "examined", lambda draw: few[:2] + few[105:107])
    changes = {"num-server-rounds": 1, "train.training-arguments.max-steps": 2}
    changes |= {"train.training-arguments.per-device-train-batch-size": 4}
    lines: list[str] = []
    found = demonstrate(3, 1, lines.append, (ARMS[0], ARMS[3]), changes)
    assert [one["epsilon"] is None for one in found] == [True, False]
    assert found[1]["guarantee"]["unit"] == "patient"
    assert [one["draw"] for one in found] == [3, 3]
    assert {one["rare"]["canaries"] for one in found} == {2}
    assert [line.partition(":")[0] for line in lines] == [
        "the base's exam",
        "epsilon none",
        "epsilon 1",
    ]


def test_the_command_writes_picture_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grandrounds.study.demonstration import runner

    found = [finding(None, MEMORY), finding(3.99, NO_MEMORY)]
    monkeypatch.setattr(runner, "demonstrate", lambda *_: found)
    result = CliRunner().invoke(
        app, ["privacy", "demo", "--out", str(tmp_path / "demo"), "--plain"]
    )
    assert result.exit_code == 0, result.output
    assert "a rehearsal and a toy" in result.output
    assert "100.0 % (18/18)" in result.output
    written = json.loads((tmp_path / "demo" / "privacy-demo.json").read_text())
    assert written["rehearsal"] is True
    assert [one["epsilon"] for one in written["arms"]] == [None, 3.99]
    assert "<style>" in (tmp_path / "demo" / "privacy-demo.svg").read_text()


def test_a_folder_that_cannot_be_made_is_told_before_anything_trains(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["privacy", "demo", "--out", str(tmp_path / "file" / "demo")])
    assert result.exit_code == 1
    assert "Choose another folder with --out" in result.output
