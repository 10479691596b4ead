"""Trackers are told of a run, each through its own library; none of them can end it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners import trackers as tracking
from grandrounds.server.listeners.tracker_libraries import NAMES, TrackedRun
from grandrounds.server.listeners.trackers import (
    FIGURES,
    Tracked,
    figures_of,
    settings_of,
    trackers_of,
)
from tests.runs import Settings, options


class Recorder(Listener):
    """A tracker, or a run's listener, that keeps what it is told; fails where it is asked to."""

    def __init__(self, fails_at: str = "") -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def _tell(self, what: str, *facts: Any) -> None:
        self.told.append((what, *facts))
        if what == self.fails_at:
            raise ConnectionError("the server is away\nand more")

    def start(self, run: TrackedRun) -> str:
        self._tell("start", run.directory, run.key, run.resumed_after)
        print("chatter of a library")
        return "somewhere"

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        self._tell("log", round_number, dict(figures))

    def finish(self, completed: bool) -> None:
        self._tell("finish", completed)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self._tell("exit")

    def on_plan(self, plan: Facts) -> None:
        self._tell("plan")

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        self._tell("roll-call")

    def on_round(self, record: Facts) -> None:
        self._tell("round")


def play(listener: Any, rounds: int = 2, error: BaseException | None = None) -> None:
    """Tell a listener what a run tells."""
    with listener:
        listener.on_plan({"directory": "/runs/first", "resumed-after": None, "run": "k1"})
        listener.on_roll_call([])
        for number in range(rounds + 1):
            listener.on_round({"round": number, "held-out-loss": 1.0 / (number + 1)})
        if error is not None:
            raise error


def wrapped(**trackers: Recorder) -> tuple[Tracked, Recorder]:
    listener = Recorder()
    return Tracked(recipes.resolve({}), listener, trackers), listener


# --- What is told ---------------------------------------------------------------------------------


def test_the_listener_is_told_everything_and_the_tracker_its_rounds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Recorder()
    run, listener = wrapped(tensorboard=tracker)
    play(run)
    assert [told[0] for told in listener.told] == ["plan", "roll-call", *["round"] * 3, "exit"]
    assert tracker.told == [
        ("start", Path("/runs/first"), "k1", 0),
        ("log", 0, {"held-out-loss": 1.0}),
        ("log", 1, {"held-out-loss": 0.5}),
        ("log", 2, {"held-out-loss": pytest.approx(1 / 3)}),
        ("finish", True),
    ]
    out, err = capsys.readouterr()
    assert out == ""  # a library's chatter is not the run's output
    assert "reports to tensorboard: somewhere" in err


def test_nothing_of_a_single_site_is_told() -> None:
    record = {
        "round": 3,
        "train-loss": 0.5,
        "held-out-loss": None,
        "cohort": [1, 2, 4],
        "good": [1, 2],
        "failed": {"4": "Traceback"},
        "site-coverage": {"1": 0.5},
        "update-norms": {"1": 0.1},
        "checkpoint": "peft_3",
    }
    assert figures_of(record) == {"train-loss": 0.5, "good-replies": 2.0, "failed-replies": 1.0}
    assert not {"site-coverage", "update-norms", "update-cosines", "cohort"} & set(FIGURES)


def test_a_round_that_did_not_finish_is_logged_at_the_round_before() -> None:
    tracker = Recorder()
    run, _ = wrapped(tensorboard=tracker)
    play(run)
    line = {"after-round": 2, "communication-mib": 1.5, "failed": {"0": "no power", "3": "so"}}
    with run:
        run.on_unfinished(line)
    figures = {"unfinished-communication-mib": 1.5, "unfinished-failed-replies": 2.0}
    assert ("log", 2, figures) in tracker.told


def test_local_paths_are_told_by_their_last_part_only() -> None:
    settings = settings_of(
        recipes.resolve({"model.name": "/home/someone/base", "run-directory": "/home/someone/run"})
    )
    assert settings["model.name"] == "base"
    assert "run-directory" not in settings
    assert settings["seed"] == 42


def test_a_failed_run_is_told_as_failed() -> None:
    tracker = Recorder()
    run, _ = wrapped(wandb=tracker)
    with pytest.raises(KeyboardInterrupt):
        play(run, error=KeyboardInterrupt())
    assert tracker.told[-1] == ("finish", False)


# --- What fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fails_at", "calls"), [("start", 1), ("log", 2), ("finish", 5)])
def test_a_tracker_that_fails_is_told_once_and_switched_off_while_others_go_on(
    fails_at: str, calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Recorder(fails_at), Recorder()
    run, listener = wrapped(mlflow=bad, trackio=good)
    play(run)
    assert len(bad.told) == calls
    assert len(good.told) == 5
    assert listener.told[-1] == ("exit",)
    err = capsys.readouterr().err
    assert err.count("mlflow failed") == 1
    assert (
        "grandrounds: mlflow failed and is disabled; the run continues: the server is away\n" in err
    )


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("none", True),
        ("wandb", True),
        ("tensorboard, mlflow", True),
        ("", False),
        ("none,wandb", False),
        ("wandb,wandb", False),
        ("tensorbord", False),
    ],
)
def test_report_to_is_one_or_several_names_with_commas(value: str, allowed: bool) -> None:
    if allowed:
        assert recipes.resolve({"train.report-to": value}).train.report_to == value
    else:
        with pytest.raises(ConfigError, match="one or more of 'none', 'tensorboard'"):
            recipes.resolve({"train.report-to": value})


def test_a_misspelt_tracker_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'tensorboard'\?"):
        recipes.resolve({"train.report-to": "tensorbord"})


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "run"
    sets = ["--set", "train.report-to=wandb,mlflow"]
    result = CliRunner().invoke(app, ["run", "--run-dir", str(folder), *sets])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "needs wandb and mlflow, which are not installed: pip install wandb mlflow, or" in line
    assert result.stdout == ""
    assert not folder.exists()


def test_none_wraps_nothing() -> None:
    listener = Recorder()
    assert tracking.tracked(recipes.resolve({}), listener) is listener
    assert trackers_of("none") == {}


def test_every_name_that_the_configuration_allows_has_a_tracker() -> None:
    for name in NAMES:
        recipes.resolve({"train.report-to": name})
    listed = ", ".join(map(repr, ("none", *NAMES)))
    with pytest.raises(ConfigError, match=f"one or more of {listed}, comma-separated"):
        recipes.resolve({"train.report-to": "x"})


# --- TensorBoard, for real ------------------------------------------------------------------------


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """Read a curve back from the run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_curves_of_a_run_and_of_its_resumption(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped after round 2; its second part writes the third, and the adapter is that
    of a run without any tracker."""
    pytest.importorskip("tensorboard")
    from grandrounds import server_app
    from grandrounds.server.rounds import play_round

    def stops_after_two(run: Any) -> None:
        if run.state.round == 2:
            raise KeyboardInterrupt
        play_round(run)

    def start(*more: str) -> int:
        chosen = [] if "--resume" in more else options(settings)
        return CliRunner().invoke(app, ["run", "--plain", *chosen, *more]).exit_code

    settings["train.report-to"] = "tensorboard"
    run = Path(settings["run-directory"])
    with monkeypatch.context() as patch:
        patch.setattr(server_app.rounds, "play_round", stops_after_two)
        assert start() == 130
    assert start("--resume", str(run)) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(m["round"], pytest.approx(m["held-out-loss"])) for m in metrics]
    assert len(expected) == 4
    assert scalars(run, "held-out-loss") == expected
    assert [step for step, _ in scalars(run, "train-loss")] == [1, 2, 3]
    untold = tmp_path / "untold"
    settings |= {"train.report-to": "none", "run-directory": str(untold)}
    assert start() == 0
    assert not (untold / "tensorboard").exists()
    weights = "peft_3/adapter_model.safetensors"
    assert (untold / weights).read_bytes() == (run / weights).read_bytes()
