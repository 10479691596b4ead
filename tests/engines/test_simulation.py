"""Flower's simulation of a run: the same adapter as in process, and the truth about failures."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grandrounds.config import recipes
from grandrounds.config.recipes import to_toml
from grandrounds.engines.folders import own_folder
from grandrounds.engines.simulation import SimulatedSites, run_simulation
from grandrounds.engines.watching import write_app
from tests.places import ROOT
from tests.processes import counted, short_folder
from tests.runs import Settings, adapter_bytes, play, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(settings: Settings, folder: Path, *arguments: str) -> list[str]:
    """Return a `grandrounds run --engine simulation` with these settings."""
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(settings))
    run = [sys.executable, "-m", "grandrounds", "run", "--engine", "simulation"]
    return [*run, "--config", str(recipe), *arguments]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However a test's simulations end: then no process of theirs is left, and no folder."""
    with short_folder() as place, counted() as living:
        monkeypatch.setenv("TMPDIR", str(place))
        monkeypatch.setattr("tempfile.tempdir", str(place))
        yield
        assert living() == []
        assert [*place.glob("gr-*")] == []


def test_both_engines_give_the_same_adapter_bit_for_bit(settings: Settings, tmp_path: Path) -> None:
    """Same seed, one thread each: order of arrival and number of processes play no part.

    Modules have ranks of their own, in a table that goes through Flower's run config.
    """
    settings |= {
        "model.lora.rank-pattern": json.dumps({"layers.0.self_attn.q_proj": 2, "v_proj": 6})
    }
    simulated = tmp_path / "simulated"
    line = command({**settings, "run-directory": str(simulated)}, tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "round 3/3" in done.stdout
    assert "status" in done.stdout

    in_process = play(settings)
    summary = summary_of(in_process)
    for checkpoint in ("peft_2", "peft_3"):
        assert adapter_bytes(simulated, checkpoint) == adapter_bytes(in_process, checkpoint)
    other = summary_of(simulated)
    for fact in ("train_loss", "held_out_loss", "communication_mib", "coverage"):
        assert other[fact] == summary[fact]
    assert other["base_loads"] == other["processes"]


def test_both_engines_give_the_same_masked_sums(settings: Settings, tmp_path: Path) -> None:
    """A site's keys and shares travel between processes in the state that Flower keeps."""
    masked = {"secure-aggregation": "masked32", "strategy.fraction-train": 1.0}
    settings = {**settings, **masked, "num-server-rounds": 1}
    simulated = tmp_path / "simulated"
    line = command({**settings, "run-directory": str(simulated)}, tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a rehearsal, since this machine holds the keys of all sites" in done.stdout
    assert adapter_bytes(simulated) == adapter_bytes(play(settings))


def test_a_run_whose_sites_fail_has_an_exit_code_that_says_so(
    settings: Settings, tmp_path: Path
) -> None:
    settings = {**settings, "model.lora.target-modules": "q_prj"}
    done = subprocess.run(command(settings, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "matches no linear module" in done.stderr
    assert not Path(settings["run-directory"]).exists()


def test_a_closed_terminal_ends_everything_and_the_run_resumes(
    settings: Settings, tmp_path: Path
) -> None:
    """Ended after the first round and resumed in process: the adapter of a whole run.

    Other signals take the same way (tests/engines/test_keeper.py).
    """
    run = Path(settings["run-directory"])
    line = command({**settings, "num-server-rounds": 40}, tmp_path)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in error
    summary = summary_of(run)
    assert summary["status"] == "stopped"
    finished = summary["rounds"]

    play(recipes.load_recipe(run / "config.toml"), **{"resume-from": str(run)})
    assert finished < 40
    play({**settings, "num-server-rounds": 40, "run-directory": str(tmp_path / "whole")})
    assert adapter_bytes(run, "peft_40") == adapter_bytes(tmp_path / "whole", "peft_40")


def test_plain_flwr_run_gives_the_same_adapter(settings: Settings, tmp_path: Path) -> None:
    """The repository itself as a Flower app, on a SuperLink of the test's own.

    With DoRA, whose start is a kind of message of its own.
    """
    settings = {**settings, "model.lora.peft-use-dora": True}
    simulated = tmp_path / "flwr"
    overrides = {**settings, "run-directory": str(simulated)}
    polls: list[float] = []
    with own_folder() as folder:
        outcome = run_simulation(
            ROOT, overrides, SimulatedSites(4), folder, lambda: polls.append(time.monotonic())
        )
        assert outcome == ("completed", "")
        assert len(polls) > 5
        assert (folder.path / "run.log").stat().st_size > 0
        assert (folder.path / "apps").is_dir()  # the bundle, without weights
    assert adapter_bytes(simulated, "peft_3") == adapter_bytes(play(settings), "peft_3")


NOTING = """
import os
from pathlib import Path
from flwr.clientapp import ClientApp
from grandrounds.client_app import app as ours
from grandrounds.model.base import base_loads

class Noting(ClientApp):
    def __call__(self, message, context):
        reply = ours(message, context)
        note = f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} {base_loads()}\\n"
        with Path(NOTES).open("a") as file:
            file.write(note)
        return reply

app = Noting()
"""
"""A ClientApp that notes after each message: its process, the GPUs in its view, loaded bases."""


@dataclasses.dataclass(frozen=True)
class OnTwoGpus(SimulatedSites):
    """Sites of a machine with two GPUs, as Ray is told; PyTorch finds none."""

    def check(self) -> None:
        pass

    @property
    def resources(self) -> str:
        sizes = "client-resources-num-cpus=1 client-resources-num-gpus=1"
        return f"num-supernodes={self.count} {sizes} init-args-num-cpus=2 init-args-num-gpus=2"


def test_sites_at_once_have_a_gpu_each_with_one_base(settings: Settings, tmp_path: Path) -> None:
    """What each process takes on its GPU is decided by PyTorch, which sees no other one there."""
    notes = tmp_path / "notes.txt"
    settings = {**settings, "strategy.fraction-train": 1.0, "num-server-rounds": 2}
    flat = {**recipes.resolve(settings).flat(), "run-directory": str(tmp_path / "simulated")}
    with own_folder() as folder:
        app = write_app(folder.path / "app", "noting")
        (app / "noting.py").write_text(NOTING.replace("NOTES", repr(str(notes))))
        sites = OnTwoGpus(4, gpus=1)
        assert run_simulation(app, flat, sites, folder) == ("completed", "")
    noted = {tuple(line.split()) for line in notes.read_text().splitlines()}
    gpu_of = {process: gpu for process, gpu, _ in noted}
    assert sorted(gpu_of.values()) == ["0", "1"]
    assert {(process, gpu) for process, gpu, _ in noted} == {*gpu_of.items()}
    assert {int(loads) for _, _, loads in noted} == {0, 1}  # 0: at the roll call
    assert adapter_bytes(tmp_path / "simulated", "peft_2") == adapter_bytes(play(settings))
