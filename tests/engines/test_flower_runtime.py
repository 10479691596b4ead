"""Flower's Simulation Runtime, started and ended by us, around a toy app without a model."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grandrounds.config.recipes import to_toml
from grandrounds.engines import simulation
from grandrounds.engines.flower import tail
from grandrounds.engines.folders import Folder, own_folder
from grandrounds.engines.keeper import marked_processes
from grandrounds.engines.simulation import (
    SimulatedSites,
    default_cpus,
    run_simulation,
    superlink,
)
from grandrounds.errors import EngineError
from grandrounds.waiting import usable_cpus
from tests.processes import counted, short_folder

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


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder for Flower's processes: after the test none is left, nor the folder."""
    with short_folder() as place, counted() as living:
        monkeypatch.setattr("tempfile.tempdir", str(place))
        with own_folder() as folder:
            yield folder
            assert living() == []
        assert [*place.iterdir()] == []


def command_lines(folder: Folder) -> dict[psutil.Process, str]:
    """Return the command lines of what runs for a folder; an actor at work bears its method's."""
    found = {}
    for process in marked_processes(str(folder.path)):
        with contextlib.suppress(psutil.Error):
            found[process] = " ".join(process.cmdline())
    return found


def test_overrides_reach_toml_with_their_types() -> None:
    values = {"a.b": "q\"' \n é\x7f", "yes": True, "n": 3, "rate": 5e-05, "none": ""}
    assert tomllib.loads(to_toml(values)) == values


def test_tail_drops_colours_and_empty_lines(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert tail(log) == ""
    log.write_text("first\n\n\x1b[92mINFO\x1b[0m: second  \n\nthird\n")
    assert tail(log, lines=2) == "INFO: second\nthird"


def test_more_cpus_than_the_machine_has_are_refused(tmp_path: Path, folder: Folder) -> None:
    there = usable_cpus()
    with pytest.raises(EngineError, match=rf"use {there} CPUs?, not .* {there + 1} CPUs"):
        run_simulation(tmp_path, {}, SimulatedSites(2, cpus=there + 1), folder)
    assert not (folder.path / "superlink.log").exists()


def test_impossible_resources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    SimulatedSites(20, 1, 0.25).check()
    with pytest.raises(EngineError, match=r"1 usable GPUs, not .* 2 GPUs"):
        SimulatedSites(20, 1, 2).check()
    with pytest.raises(EngineError, match="at least one site"):
        SimulatedSites(0, 1, 0).check()


def test_a_site_reserves_a_cpu_for_each_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "usable_cpus", lambda: 4)
    assert [default_cpus(threads) for threads in (0, 1, 3, 4, 64)] == [1, 1, 3, 4, 4]


def test_a_cpu_that_the_process_may_not_use_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `taskset -c 0`, which Ray's own count does not see."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert default_cpus(2) == 1
    with pytest.raises(EngineError, match="may use 1 CPU, not 4 sites, 2 CPUs"):
        SimulatedSites(4, cpus=2).check()
    assert "init-args-num-cpus=1" in SimulatedSites(4).resources


def test_superlink_that_does_not_come_up_in_time_is_an_error(folder: Folder) -> None:
    with (
        pytest.raises(EngineError, match=r"did not answer .* within 0 seconds"),
        superlink(folder, start_timeout_seconds=0),
    ):
        pytest.fail("came up")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wrong_key_is_an_engine_error_that_names_it(toy_app: Path, folder: Folder) -> None:
    with pytest.raises(EngineError, match=r"refused `flwr run`: (?s:.*)Key 'no-such-key'"):
        run_simulation(toy_app, {"no-such-key": 1}, SimulatedSites(2), folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_death_of_the_superlink_in_mid_run_is_an_error(toy_app: Path, folder: Folder) -> None:
    def kill_when_clients_run() -> None:
        lines = command_lines(folder)
        if any("ClientAppActor.run" in line for line in lines.values()):
            for process, line in lines.items():
                if "flower-superlink --insecure" in line and "keeper" not in line:
                    process.kill()

    with pytest.raises(EngineError, match=r"SuperLink ended with code 137 (?s:.*)Uvicorn running"):
        run_simulation(toy_app, {}, SimulatedSites(3), folder, kill_when_clients_run)
