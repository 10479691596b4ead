"""A tracker runs in a process of its own: one that hangs, fails or is left alone holds nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.server.listeners import Listener, tracker_process
from grandrounds.server.listeners.tracker_libraries import TrackedRun
from grandrounds.server.listeners.tracker_process import Apart
from grandrounds.server.listeners.trackers import Tracked
from tests.silent import silent

LIBRARY = '''
"""Stands for Trackio: writes what it is told into a file, speaks, fails and hangs when asked to."""
import atexit, json, os, time, urllib.request

def tell(what, **facts):
    with open(os.environ["TOLD"], "a") as file:
        print(json.dumps({"what": what, "pid": os.getpid(), **facts}), file=file)
    print("chatter of a library")

def init(**facts):
    if url := os.environ.get("ASKS"):
        urllib.request.urlopen(url)
    tell("init", environment=dict(os.environ), **facts)

def log(figures, step):
    if "held-out-loss" not in figures:
        raise RuntimeError("the server is away\\nand more")
    time.sleep(figures["held-out-loss"])
    tell("log", step=step)

def finish():
    tell("finish")
    atexit.register(time.sleep, float(os.environ.get("ENDS_AFTER", 0)))
'''
RUN = TrackedRun(Path("/runs/first"), "k1", {"seed": 42})


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the library above, which is in Trackio's place."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "trackio.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_library_is_told_in_another_process_whose_output_is_not_the_run_s(
    told: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its environment has the libraries report nothing to their makers."""
    tracker = Apart("trackio")
    assert tracker.start(RUN) == "trackio show --project grandrounds"
    tracker.log(1, {"held-out-loss": 0.0})
    tracker.finish(True)
    init, log, finish = lines(told)
    assert (init["what"], log["step"], finish["what"]) == ("init", 1, "finish")
    assert init["config"] == {"seed": 42}
    assert init["pid"] != os.getpid()
    assert not is_alive(init["pid"])
    environment = init["environment"]
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["WANDB_ERROR_REPORTING"] == "false"
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("chatter of a library") == 3


def test_a_tracker_that_does_not_answer_is_given_up_and_the_run_goes_on(
    told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker_process, "ANSWER_SECONDS", 0.3)
    tracker, listener = Apart("trackio"), Listener()
    rounds: list[int] = []
    monkeypatch.setattr(listener, "on_round", lambda record: rounds.append(record["round"]))
    with silent() as server:
        monkeypatch.setenv("ASKS", server.url)
        with Tracked(recipes.resolve({}), listener, {"trackio": tracker}) as run:
            run.on_plan({"directory": "/runs/first", "resumed-after": None, "run": "k1"})
            run.on_round({"round": 0, "held-out-loss": 0.5})
        assert len(server.held) == 1
    assert rounds == [0]
    assert not told.exists()
    assert capsys.readouterr().err == (
        "grandrounds: trackio failed and is disabled; the run continues: no answer within 0.3 s\n"
    )
    assert tracker._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("figures", "error", "said"),
    [
        ({"train-loss": 0.5}, ConnectionError, "^the server is away$"),
        ({"held-out-loss": 60.0}, TimeoutError, "^no answer within 0.3 s$"),
    ],
)
def test_a_tracker_that_fails_later_is_ended_too(
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
    figures: dict[str, float],
    error: type[OSError],
    said: str,
) -> None:
    tracker = Apart("trackio")
    tracker.start(RUN)
    if error is TimeoutError:
        monkeypatch.setattr(tracker_process, "ANSWER_SECONDS", 0.3)
    with pytest.raises(error, match=said):
        tracker.log(1, figures)
    assert not is_alive(lines(told)[0]["pid"])


def test_a_process_that_was_killed_is_told_and_one_that_does_not_end_is_ended(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Apart("trackio")
    killed.start(RUN)
    os.kill(lines(told)[-1]["pid"], signal.SIGKILL)
    with pytest.raises(ConnectionError, match="its process ended, code -9"):
        killed.log(1, {"held-out-loss": 0.0})
    monkeypatch.setenv("ENDS_AFTER", "60")
    lingers = Apart("trackio")
    lingers.start(RUN)
    monkeypatch.setattr(tracker_process, "ANSWER_SECONDS", 1.0)
    lingers.finish(True)
    assert lingers._process.returncode == -signal.SIGKILL


def test_ctrl_c_amid_a_question_leaves_the_tracker_to_be_ended_properly(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that was not waited for is not taken for that of the next question."""
    tracker = Apart("trackio")
    tracker.start(RUN)

    def interrupted(*arguments: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tracker._link), "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.log(1, {"held-out-loss": 0.2})
    tracker.finish(False)
    assert [line["what"] for line in lines(told)] == ["init", "log", "finish"]


def test_the_process_finishes_the_tracker_and_ends_where_the_run_was_killed(told: Path) -> None:
    run = (
        "import os, signal\nfrom pathlib import Path\n"
        "from grandrounds.server.listeners.tracker_libraries import TrackedRun\n"
        "from grandrounds.server.listeners.tracker_process import Apart\n"
        "Apart('trackio').start(TrackedRun(Path('/runs/first'), 'k1', {}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", run], env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL
    pid, until = lines(told)[0]["pid"], time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(pid)
    assert [line["what"] for line in lines(told)] == ["init", "finish"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_server_that_never_answers_holds_no_library_longer(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    with silent() as server:
        for variable, value in (
            ("WANDB_API_KEY", "a" * 40),
            ("WANDB_BASE_URL", server.url),
            ("WANDB_MODE", "online"),
            ("MLFLOW_TRACKING_URI", server.url),
            ("TRACKIO_DIR", str(tmp_path / "trackio")),
            ("TRACKIO_SERVER_URL", f"{server.url}?write_token=x"),
        ):
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(tracker_process, "ANSWER_SECONDS", 3.0)
        tracker = Apart(name)
        with pytest.raises(TimeoutError, match="no answer within 3 s"):
            tracker.start(TrackedRun(tmp_path, "k1", {}))
        assert server.held
