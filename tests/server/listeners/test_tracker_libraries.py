"""Each tracker is told a run by the calls that its documentation names, and nothing else of here.

Where a library is installed, what it has written is read back.
"""

from __future__ import annotations

import json
import platform
import sqlite3
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from grandrounds.server.listeners.tracker_libraries import LIBRARIES, TrackedRun
from grandrounds.server.listeners.tracker_process import Apart
from tests.silent import silent

RUN = TrackedRun(Path("/runs/first"), "k1", {"seed": 42})


# --- Identity -------------------------------------------------------------------------------------


def test_the_run_s_own_key_tells_it_apart_wherever_it_lies(tmp_path: Path) -> None:
    """A new run in a folder of the same name is another one; a run that was moved is the same."""
    assert TrackedRun(Path("/runs/first"), "k2", {}).identity != RUN.identity
    assert TrackedRun(tmp_path / "first", "k1", {}, resumed_after=2).identity == RUN.identity
    assert len(RUN.identity) == 16
    of_old = [TrackedRun(Path("/runs") / name, "0", {}).identity for name in ("first", "second")]
    assert of_old[0] != of_old[1]  # runs of early versions, which have no key


def test_a_run_that_has_gone_back_is_another_run_for_trackers(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, "k1", {}, resumed_after=2)
    before = run.identity
    (tmp_path / "aside-1").mkdir()
    assert run.identity != before


# --- By the calls ---------------------------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> list[Any]:
    """Put a module in a library's place which has these functions only, and records their calls."""
    calls: list[Any] = []
    module = types.ModuleType(name)

    def recording(function: str, result: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((function, args, kwargs))
            return result

        return call

    for function, result in functions.items():
        setattr(module, function, recording(function, result))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def told(name: str, run: TrackedRun = RUN) -> str:
    """Tell a tracker of one round of a run; return where it says to look."""
    tracker = LIBRARIES[name]()
    tracker.prepare()
    where = tracker.start(run)
    tracker.log(1, {"train-loss": 0.5})
    tracker.finish(True)
    return where


def test_mlflow_is_told_parameters_and_metrics_by_round_and_no_tags_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    done: list[Any] = []
    client = types.SimpleNamespace(
        create_run=lambda experiment, **facts: (
            done.append((experiment, facts))
            or types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
        ),
        log_batch=lambda run_id, **facts: done.append((run_id, facts)),
        set_terminated=lambda run_id, status: done.append((run_id, status)),
    )
    experiment = types.SimpleNamespace(experiment_id="7")
    functions = {"get_tracking_uri": "http://x", "MlflowClient": client}
    calls = fake(monkeypatch, "mlflow", **functions, set_experiment=experiment)
    sys.modules["mlflow"].entities = types.SimpleNamespace(  # type: ignore[attr-defined]
        Param=lambda key, value: (key, value),
        Metric=lambda name, value, now_ms, step: (name, value, step),
    )
    assert told("mlflow") == "MLflow at http://x, run abc"
    assert ("set_experiment", ("grandrounds",), {}) in calls
    assert done == [
        ("7", {"tags": {"grandrounds.run": RUN.identity}, "run_name": "first"}),
        ("abc", {"params": [("seed", "42")]}),
        ("abc", {"metrics": [("train-loss", 0.5, 1)]}),
        ("abc", "FINISHED"),
    ]


def test_trackio_goes_on_with_a_resumed_run_and_with_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trackio continues the run of the same name."""
    monkeypatch.setenv("TRACKIO_PROJECT", "ward 7's")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # to be restored
    calls = fake(monkeypatch, "trackio", init=None, log=None, finish=None)
    assert told("trackio") == """trackio show --project 'ward 7'"'"'s'"""
    ((_, _, asked), log, finish) = calls
    assert (asked["project"], asked["resume"]) == ("ward 7's", "allow")
    assert asked["name"] == f"first-{RUN.identity[:8]}"
    assert asked["config"] == {"seed": 42}
    assert log == ("log", ({"train-loss": 0.5},), {"step": 1})
    assert finish == ("finish", (), {})
    told("trackio", TrackedRun(RUN.directory, "k1", {}, resumed_after=2))
    told("trackio", TrackedRun(RUN.directory, "k2", {}))
    first, resumed, other = [facts["name"] for what, _, facts in calls if what == "init"]
    assert first == resumed != other


def test_wandb_is_sent_neither_host_nor_terminal_nor_code_nor_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    done: list[Any] = []
    run = types.SimpleNamespace(
        offline=False,
        url="https://wandb.ai/run",
        log=lambda figures, step: done.append((figures, step)),
        finish=lambda exit_code: done.append(exit_code),
    )
    calls = fake(monkeypatch, "wandb", init=run, Settings="settings")
    assert told("wandb") == "https://wandb.ai/run"
    (_, _, sent), (_, _, asked) = calls
    assert (sent["host"], sent["console"], sent["save_code"]) == ("", "off", False)
    off = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats")
    assert all(sent[key] for key in (*off, "x_disable_machine_info"))
    assert (asked["name"], asked["resume"], asked["id"]) == ("first", "allow", RUN.identity)
    assert done == [({"train-loss": 0.5}, 1), 0]


# --- By what the libraries have written -----------------------------------------------------------

HOST, LOGIN = "ward-seven-server", "dr-florence"


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    """A run on a machine of a name, by a user, in a folder that are all easily recognised."""
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text(
        f"import platform, socket\nsocket.gethostname = platform.node = lambda: {HOST!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "startup")
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, LOGIN)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "of-florence" / "first"
    directory.mkdir(parents=True)
    return TrackedRun(directory, "k1", {"seed": 42, "model.name": "base"})


def written(name: str, run: TrackedRun) -> None:
    """Tell an installed tracker of a run of one round, in its own process as in a run."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    tracker = Apart(name)
    tracker.start(run)
    tracker.log(0, {"held-out-loss": 0.5})
    tracker.log(1, {"train-loss": 0.25})
    tracker.finish(True)


def traces(content: bytes) -> set[str]:
    """Return what a content says of this machine, its user and its program."""
    kernel = platform.release()
    telltale = {
        HOST,
        LOGIN,
        "of-florence",
        "tracker_process",
        str(Path.cwd()),
        sys.executable,
        kernel,
    }
    return {trace for trace in telltale if trace.encode() in content}


def wandb_records(content: bytes) -> Iterator[Any]:
    """Yield the records of an offline run: a log of blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # too little for a record's header: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_what_wandb_has_written_names_no_host_no_user_and_no_program(
    traced: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    written("wandb", traced)
    (folder,) = (traced.directory / "wandb").glob("offline-run-*")
    assert not list(folder.glob("files/**/*.*"))  # no metadata, requirements or terminal output
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    assert traces(content) == set()
    records = list(wandb_records(content))
    kinds = {record.WhichOneof("record_type") for record in records}
    assert {"run", "history"} <= kinds
    assert not kinds & {"environment", "stats", "output", "output_raw", "files", "metric"}
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.display_name, run.host) == (traced.identity, "first", "")
    assert not run.HasField("git")
    steps = [record.history for record in records if record.HasField("history")]
    told = {item.nested_key[0]: item.value_json for step in steps for item in step.item}
    assert (told["held-out-loss"], told["train-loss"]) == ("0.5", "0.25")


def test_what_mlflow_has_written_names_no_host_no_user_and_no_program(
    traced: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    written("mlflow", traced)
    (run,) = tmp_path.glob("store/*/*/tags")
    tags = {tag.name: tag.read_text() for tag in run.iterdir()}
    assert tags == {"mlflow.runName": "first", "grandrounds.run": traced.identity}
    files = [file for file in run.parent.rglob("*") if file.is_file() and file.name != "meta.yaml"]
    assert {file.name for file in files} >= {"seed", "held-out-loss", "train-loss"}
    assert traces(b"".join(file.read_bytes() for file in files)) == set()
    about = (run.parent / "meta.yaml").read_text()
    assert "user_id: unknown\n" in about
    assert "source_name: ''\n" in about
    assert HOST not in about
    assert LOGIN not in about


def test_what_trackio_has_written_names_no_host_and_no_user_of_the_hub(
    traced: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trackio asks the hub whose token it has, which would be told; it is not to ask."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with silent() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_florence")
        written("trackio", traced)
        assert not hub.held
    file = tmp_path / "trackio" / "grandrounds.db"
    assert traces(file.read_bytes()) == set()
    with closing(sqlite3.connect(file)) as database:
        ((name, config),) = database.execute("SELECT run_name, config FROM configs")
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert name == f"first-{traced.identity[:8]}"
    told = json.loads(config)
    assert {key: told[key] for key in told if key != "_Created"} == {
        **traced.settings,
        "_Username": None,
        "_Group": None,
    }
    assert [(step, json.loads(said)) for step, said in rows] == [
        (0, {"held-out-loss": 0.5}),
        (1, {"train-loss": 0.25}),
    ]
