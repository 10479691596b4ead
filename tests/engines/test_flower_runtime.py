"""Flower's Simulation Runtime, started and ended by us, around a toy app without a model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from grandrounds.config.recipes import to_toml
from grandrounds.engines import simulation
from grandrounds.engines.flower import tail
from grandrounds.engines.simulation import (
    MARKER,
    SimulatedSites,
    default_cpus,
    end_processes,
    marked_processes,
    run_simulation,
    superlink,
)
from grandrounds.errors import EngineError

PYPROJECT = """
[project]
name = "toy"
version = "0.1.0"
description = "A round without a model that never ends"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "grandrounds"

[tool.flwr.app.components]
serverapp = "toy_server:app"
clientapp = "toy_client:app"

"""

CLIENT = """
import time

from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    time.sleep(3600)
"""

SERVER = """
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.05)
    grid.send_and_receive(
        [Message(RecordDict(), message_type="train", dst_node_id=node) for node in nodes]
    )
"""


@pytest.fixture
def toy_app(tmp_path: Path) -> Path:
    app = tmp_path / "toy"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "toy_client.py").write_text(CLIENT)
    (app / "toy_server.py").write_text(SERVER)
    return app


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the living processes whose FLWR_HOME is `home`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def clients_run(home: Path) -> bool:
    """Return whether an actor of Ray is at work; its process then bears the method's name."""
    names = []
    for process in processes_of(home):
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline()))
    return any("ClientAppActor.run" in name for name in names)


def test_overrides_reach_toml_with_their_types() -> None:
    values = {"a.b": "q\"' \n é\x7f", "yes": True, "n": 3, "rate": 5e-05, "none": ""}
    assert tomllib.loads(to_toml(values)) == values


def test_tail_drops_colours_and_empty_lines(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert tail(log) == ""
    log.write_text("first\n\n\x1b[92mINFO\x1b[0m: second  \n\nthird\n")
    assert tail(log, lines=2) == "INFO: second\nthird"


def test_more_cpus_than_the_machine_has_are_refused(tmp_path: Path) -> None:
    there = os.cpu_count() or 1
    with pytest.raises(EngineError, match=rf"has {there} CPUs, not .* {there + 1} CPUs"):
        run_simulation(tmp_path, {}, SimulatedSites(2, cpus=there + 1), tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_impossible_resources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    SimulatedSites(20, 1, 0.25).check()
    with pytest.raises(EngineError, match=r"1 usable GPUs, not .* 2 GPUs"):
        SimulatedSites(20, 1, 2).check()
    with pytest.raises(EngineError, match="at least one site"):
        SimulatedSites(0, 1, 0).check()


def test_a_site_reserves_a_cpu_for_each_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [default_cpus(threads) for threads in (0, 1, 3, 4, 64)] == [1, 1, 3, 4, 4]


def test_marked_processes_are_ended_even_if_they_ignore_sigterm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulation, "END_PATIENCE_SECONDS", 1.0)
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print('up', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", stubborn]
    with subprocess.Popen(command, env={MARKER: "test"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(marked_processes("test")) == 2
        end_processes("test")
    assert marked_processes("test") == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_superlink_is_gone_after_use(tmp_path: Path) -> None:
    with superlink(tmp_path / "home") as link:
        assert link.process.poll() is None
        assert processes_of(link.home)
    assert processes_of(tmp_path / "home") == []
    assert "Uvicorn running" in (tmp_path / "home" / "superlink.log").read_text()


def test_superlink_that_does_not_come_up_in_time_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"did not answer .* within 0 seconds"),
        superlink(tmp_path, start_timeout_seconds=0),
    ):
        pytest.fail("came up")
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_refusal_of_flower_is_an_engine_error(tmp_path: Path, toy_app: Path) -> None:
    with pytest.raises(EngineError, match=r"refused `flwr run`: (?s:.*)Invalid run configuration"):
        run_simulation(toy_app, {"no-such-key": 1}, SimulatedSites(2), tmp_path / "home")
    assert processes_of(tmp_path / "home") == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_death_of_the_superlink_in_mid_run_is_an_error(tmp_path: Path, toy_app: Path) -> None:
    home = tmp_path / "home"

    def kill_when_clients_run() -> None:
        if clients_run(home):
            for process in processes_of(home):
                if any("flower-superlink" in argument for argument in process.cmdline()):
                    process.kill()

    with pytest.raises(EngineError, match=r"SuperLink ended with code -9 (?s:.*)Uvicorn running"):
        run_simulation(toy_app, {}, SimulatedSites(3), home, kill_when_clients_run)
    assert processes_of(home) == []
