"""MLflow's own server: what it returns is metrics.jsonl, and its end does not end the run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from grandrounds.config import recipes
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.tracker_process import ANSWER_SECONDS, Apart
from grandrounds.server.listeners.trackers import Tracked, figures_of
from tests.real import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LINES = [
    {"round": 0, "held-out-loss": 1.4556123, "communication-mib": 1.9, "evaluated": [1]},
    {
        **{"round": 1, "train-loss": 0.68, "held-out-loss": 1.27, "examples": 96},
        **{"cohort": [0, 1], "good": [0], "failed": {"1": "no power"}},
    },
    {"round": 2, "train-loss": 5e-05, "held-out-loss": 1e9, "cohort": [], "good": [], "failed": {}},
]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Start `mlflow server` on a free port, with a database of its own."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/runs.sqlite"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    paths = os.pathsep.join(filter(None, sys.path))
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        return False

    try:
        wait_for(answers, 240, "mlflow server does not answer")
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tracked() -> Tracked:
    return Tracked(recipes.resolve({}), Listener(), {"mlflow": Apart("mlflow")})


def test_what_the_server_returns_is_metrics_jsonl(
    server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    import mlflow

    with tracked() as run:
        run.on_plan({"directory": str(tmp_path / "first"), "resumed-after": None, "run": "k1"})
        for line in LINES:
            run.on_round(line)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("grandrounds")
    [kept] = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("first", "FINISHED")
    assert kept.data.params["seed"] == "42"
    read = {
        (metric.step, name): metric.value
        for name in kept.data.metrics
        for metric in client.get_metric_history(kept.info.run_id, name)
    }
    told = [(line["round"], figures_of(line)) for line in LINES]
    assert read == {(number, name): v for number, of in told for name, v in of.items()}


def test_a_server_that_is_killed_holds_the_run_ten_seconds_once(
    server: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracked() as run:
        run.on_plan({"directory": str(tmp_path / "first"), "resumed-after": None, "run": "k1"})
        run.on_round(LINES[0])
        kill(server)
        began = time.monotonic()
        for line in LINES[1:]:
            run.on_round(line)
    assert time.monotonic() - began < ANSWER_SECONDS + 2
    said = capsys.readouterr().err
    assert said.count("mlflow failed and is disabled; the run continues: ") == 1
