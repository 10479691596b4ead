"""Run directories written by an earlier version resume, are planned alike and can be reported.

tests/fixtures/runs holds four runs of the embedded base and formulary on four sites: one finished,
three interrupted after round 2 of 4.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.wire import messages
from tests.runs import (
    GOOD_SITES,
    RUNS,
    adapter_bytes,
    copy_of,
    metrics_of,
    play,
    read_json,
    summary_of,
)

INTERRUPTED = ["plain", "ffa-ternary-incremental", "flora"]

SCORES = {f"{kind}-{which}-{figure}": 0 if figure == "correct" else 1
          for kind in ("public", "private") for which in ("base", "tuned")
          for figure in ("correct", "n")}  # fmt: skip


def command(*arguments: object) -> str:
    """Run a command that must succeed; return its standard output."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def without_exam(message: Message, context: Context) -> Message:
    """Answer as a real site, but skip the formulary exam."""
    if message.metadata.message_type == f"{MessageType.EVALUATE}.formulary":
        counts = {"base-loads": 0, "process-id": 1, **SCORES}
        return Message(messages.content(metrics=counts), reply_to=message)
    return GOOD_SITES(message, context)


def test_the_fixtures_are_what_their_names_say() -> None:
    assert sorted(folder.name for folder in RUNS.iterdir()) == sorted(["finished", *INTERRUPTED])
    for name in INTERRUPTED:
        summary = summary_of(RUNS / name)
        assert (summary["status"], summary["rounds"]) == ("stopped", 2)
    config = recipes.load_recipe(RUNS / "ffa-ternary-incremental" / "config.toml")
    told = [
        config[f"communication.{key}"] for key in ("uplink-codec", "downlink-codec", "downlink")
    ]
    assert (config["strategy.name"], *told) == ("ffa", "ternary", "ternary", "incremental")
    assert recipes.load_recipe(RUNS / "flora" / "config.toml")["strategy.name"] == "flora"


def check_resumed(run: Path, before: Path, caught_up: dict[str, dict[str, int]]) -> None:
    """Check a resumed run against the directory it was resumed from.

    Parameters
    ----------
    caught_up
        Message kind → counts of the ledger that differ from the plan.
    """
    summary, lines, kept = summary_of(run), metrics_of(run), metrics_of(before)
    assert (summary["status"], summary["rounds"], summary["adapter"]) == ("completed", 4, "peft_4")
    assert summary["failed_replies"] == 0
    assert lines[:3] == kept
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    sent = [line["communication-mib"] for line in lines]
    assert sent == sorted(set(sent))
    assert all(line["failed"] == line["evaluate-failed"] == {} for line in lines[1:])
    assert lines[-1]["held-out-loss"] < lines[0]["held-out-loss"]
    assert lines[-1]["coverage"] > kept[-1]["coverage"]
    assert adapter_bytes(run, "peft_2") == adapter_bytes(before, "peft_2")
    assert adapter_bytes(run, "peft_4") != adapter_bytes(before, "peft_2")

    totals, plan = read_json(run / "ledger.json")["totals"], read_json(run / "plan.json")
    assert plan == read_json(before / "plan.json")
    expected = {
        kind: {**plan["totals"][kind], **caught_up.get(kind, {})} for kind in plan["totals"]
    }
    assert totals == expected
    for kind, counted in read_json(before / "ledger.json")["totals"].items():
        assert totals[kind]["messages"] > counted["messages"]
    assert f"written: {run / 'report.html'}" in command("report", run)
    assert "Completed: 4 rounds" in (run / "report.html").read_text()


CAUGHT_UP = {
    "ffa-ternary-incremental": {
        "evaluate.down": {"tensor_bytes": 4180, "key_bytes": 53},
        "train.down": {"tensor_bytes": 4630, "key_bytes": 30},
    },
    "flora": {},
}
"""Ledger counts that differ from the plan, as counted by the version that wrote the runs: restarted
sites hold no adapter, so an incremental downlink first sends each of them a complete one."""


@pytest.mark.parametrize("name", CAUGHT_UP)
def test_an_interrupted_run_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    run = copy_of(name, tmp_path)
    play(recipes.load_recipe(run / "config.toml"), without_exam, **{"resume-from": str(run)})
    check_resumed(run, RUNS / name, CAUGHT_UP[name])


ADDED = {"weights", "held-out-loss-median", "held-out-losses", "communication-up-mib"}
"""Keys of metrics.jsonl since these runs."""


@pytest.mark.slow
def test_a_run_resumed_at_the_command_line_ends_as_the_one_that_was_not_interrupted(
    tmp_path: Path,
) -> None:
    """Both runs have the same configuration; rounding differs between machines."""
    run = copy_of("plain", tmp_path)
    command("run", "--plain", "--resume", run)
    check_resumed(run, RUNS / "plain", {})
    for line, expected in zip(metrics_of(run), metrics_of(RUNS / "finished"), strict=True):
        assert line.keys() - ADDED == expected.keys()
        assert line.get("cohort") == expected.get("cohort")
        assert line["held-out-loss"] == pytest.approx(expected["held-out-loss"], rel=1e-3)
    summary, expected = summary_of(run), summary_of(RUNS / "finished")
    assert summary.keys() == expected.keys()
    for kind, counts in expected["formulary"].items():
        assert summary["formulary"][kind]["base"]["n"] == counts["base"]["n"]
        assert abs(summary["formulary"][kind]["base"]["correct"] - counts["base"]["correct"]) <= 3


def test_a_finished_run_is_planned_to_the_byte_as_it_was(tmp_path: Path) -> None:
    plan = read_json(RUNS / "finished" / "plan.json")
    config = RUNS / "finished" / "config.toml"
    content = json.loads(command("plan", "--config", config, "--json", "-"))
    assert {**content["communication"], "target-modules": content["target-modules"]} == plan
    assert plan["totals"] == read_json(RUNS / "finished" / "ledger.json")["totals"]


def test_finished_and_interrupted_runs_stand_side_by_side_in_a_report(tmp_path: Path) -> None:
    runs = [copy_of(name, tmp_path) for name in ("finished", *INTERRUPTED)]
    command("report", *runs, "--out", tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    assert "4 runs side by side" in page
    assert "Completed: 4 rounds" in page
