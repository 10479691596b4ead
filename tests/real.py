"""A consortium of real processes: SuperLink, agents and SuperNodes, all ended afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.supernode.register import try_load_public_key
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import RegisterNodeRequest

from grandrounds.config import recipes
from grandrounds.engines.deployment import admissions, local, rosters, set_up
from grandrounds.engines.deployment.local import free_port as free_port
from grandrounds.engines.deployment.local import is_open
from grandrounds.engines.deployment.superlink import in_one_array
from grandrounds.engines.flower import quiet
from grandrounds.engines.keeper import MARKER, marked_processes
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire.masks.roster import FILE
from tests.own_sites import write_partition
from tests.places import ROOT
from tests.runs import Settings, metrics_of, options, play

BIN = Path(sys.executable).parent

FORMULARY: Settings = {
    "model.name": "formulary",
    "static.dataset.name": "formulary",
    "data.num-partitions": 3,
    "data.held-out-fraction": 0.05,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 0.0,
    "train.num-threads": 1,
    "train.save-every-round": 100,
    "seed": 42,
}
"""The embedded base and formulary on three sites."""


def end_processes(marker: str) -> None:
    """Kill every process that carries a marker, and wait until none is left."""

    def are_gone() -> bool:
        left = marked_processes(marker)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    wait_for(are_gone, 20, f"processes of {marker} are left")


def wait_for(what: Callable[[], Any], seconds: float = 60, why: str = "") -> Any:
    """Poll a function until its result is true; return the result."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, why or "nothing came"
        time.sleep(0.1)
    return found


class Consortium:
    """The processes of a consortium in one folder; the context manager ends them all."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        host: str = "127.0.0.1",
        outside: Sequence[Sequence[str]] = (),
        gate: bool = False,
        **site_changes: Any,
    ) -> None:
        """Set up a consortium without starting anything.

        Parameters
        ----------
        host : str
            Where the SuperLink listens.
        outside
            For each site, a prefix of its SuperNode's command (a network namespace).
        gate : bool
            Whether sites connect through nginx, which `start_gate` starts.
        site_changes
            `section__key` of each site.toml.
        """
        self.folder, self.settings, self.host, self.gate = folder, settings, host, gate
        self.outside = list(outside)
        self.port = free_port(2)
        self.marker = f"test-{secrets.token_hex(4)}"
        self.home = set_up.init_consortium(folder / "consortium", "trial", host, self.port)
        if not gate:
            local.without_gate(self.home, f"{host}:{self.port + 1}")
        (folder / "flwr").mkdir()
        entry = (self.home / "flower-config.toml").read_text().replace("127.0.0.1", host)
        (folder / "flwr" / "config.toml").write_text(entry)
        self.sites: list[SiteFile] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for i in range(int(settings["data.num-partitions"])):
            self.sites.append(self._site(i, site_changes))

    def share_roster(self) -> None:
        """Sign the roster of the admitted sites; every site accepts it."""
        rosters.write_roster(self.home)
        for site in self.sites:
            rosters.accept(site, rosters.offered(site, self.home / FILE))

    def _site(self, i: int, changes: Mapping[str, Any]) -> SiteFile:
        settings = self.settings
        folder = set_up.init_site(self.folder / f"site{i}", f"site-{i}")
        write_partition(folder / "cards.jsonl", settings, i)
        values = {
            "data__source": "cards.jsonl",
            "data__held_out_seed": settings["seed"],
            "data__held_out_fraction": settings["data.held-out-fraction"],
            "policy__min_examples": 1,
            "policy__max_rank": 64,
            "policy__min_examples_per_visit": 1,
            "tell__telemetry": True,
            **changes,
        }
        named = {k.replace("__", ".").replace("_", "-"): v for k, v in values.items()}
        name = str(settings["model.name"])
        local.fill_in(folder / "site.toml", named, {name: "" if name == "formulary" else name})
        count = int(settings["data.num-partitions"])
        return local.joined_site(self.home, folder, (i, count))

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every process of the consortium."""
        here = str(ROOT)
        return quiet() | {
            MARKER: self.marker,
            "FLWR_HOME": str(self.folder / "flwr"),
            "PYTHONPATH": here,
            "HF_HUB_OFFLINE": "1",
        }

    def __enter__(self) -> Consortium:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process."""
        end_processes(self.marker)
        for name in [*self.running]:  # nginx overwrites its environment, and with it the marker
            self.kill(name)

    # --- Processes --------------------------------------------------------------------------------

    def start(
        self, name: str, command: Sequence[str], *, without: str = "", **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to `<name>.log`.

        Parameters
        ----------
        without : str
            A variable that its environment lacks.
        """
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in self.environment.items() if k != without},
                cwd=self.folder,
                start_new_session=True,
                **options,
            )
        self.running[name] = process
        return process

    def log(self, name: str) -> str:
        """Return the log of a process."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start_superlink(self) -> None:
        """Start the SuperLink as its systemd unit does, and wait until it answers."""
        command = [
            word.replace("127.0.0.1", self.host) if word == "127.0.0.1" else word
            for word in set_up.superlink_command(self.home, self.port)
        ]
        self.start("superlink", command, without="FLWR_SUPEREXEC_TASK_POLL_INTERVAL")
        wait_for(lambda: is_open(self.host, self.port + 1), 60, "the SuperLink does not listen")

    def start_gate(self) -> None:
        """Start nginx with the gate configuration written by `consortium init`."""
        conf = self.folder / "nginx.conf"
        conf.write_text(
            f"daemon off; pid {self.folder}/nginx.pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; include {self.home}/gate.conf; }}\n"
        )
        self.start("gate", ["nginx", "-p", str(self.folder), "-c", str(conf)])
        wait_for(lambda: is_open(self.host, self.port), 20, self.log("gate"))

    def register(self, i: int) -> None:
        """Register a site's key with the SuperLink, as `flwr supernode register` does."""
        public = self.home / "admissions" / f"site-{i}.pub"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLWR_HOME", str(self.folder / "flwr"))
            client = init_http_client_from_connection(read_superlink_connection("trial"))
        try:
            key = try_load_public_key(public)
            asked = RegisterNodeRequest(public_key=key, name=f"site-{i}")
            admissions.note_node(public, client.RegisterNode(request=asked).node_id)
        finally:
            client.close()

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Return the JSON output of a `flwr` command."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments, "--format", "json"],
            env=self.environment,
            capture_output=True,
            text=True,
            cwd=self.folder,
        )
        start = done.stdout.find("{")
        answer: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        return answer or {"output": done.stdout + done.stderr}

    def start_agent(self, i: int, *, seeded: bool = True, **options: Any) -> None:
        """Start a site's agent, and wait until it serves.

        Parameters
        ----------
        seeded : bool
            Whether its examples come in the order of the run, as in process.
        """
        name = f"agent{i}"
        said = self.log(name).count("listens on")
        own = ["grandrounds", "site", "serve"]
        command = [sys.executable, "-m", *(["tests.seeded_agent"] if seeded else own)]
        self.start(name, [*command, "--config", str(self.sites[i].path)], **options)
        wait_for(lambda: self.log(name).count("listens on") > said, 60, self.log(name))

    def supernode_command(self, i: int, *, agent: bool = True) -> list[str]:
        """Return the command of a site's SuperNode, on a port of its own."""
        command = set_up.supernode_command(self.sites[i], free_port())
        if not agent:
            place = command.index("--node-config") + 1
            numbers = command[place].partition(" agent=")[0]
            command[place] = f"{numbers} site={json.dumps(str(self.sites[i].path))}"
        return [*(self.outside[i] if self.outside else ()), *command]

    def start_supernode(self, i: int, *, agent: bool = True, **options: Any) -> None:
        """Start a site's SuperNode, which connects by itself."""
        self.start(f"node{i}", self.supernode_command(i, agent=agent), **options)

    def restart_supernode(self, i: int) -> None:
        """Restart a killed SuperNode until it stays up, as its systemd unit does.

        Flower accepts it only after noticing that the previous one is gone.
        """
        name = f"node{i}"

        def stays() -> bool:
            said = self.log(name).count("SuperNode ID:")
            self.start_supernode(i)
            process = self.running[name]
            wait_for(
                lambda: process.poll() is not None or self.log(name).count("SuperNode ID:") > said
            )
            if process.poll() is None:
                return True
            self.kill(name)
            time.sleep(3)
            return False

        wait_for(stays, 120, self.log(name))

    def kill(self, name: str) -> None:
        """Kill a process and its children."""
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)

    def start_all(self, *, agents: bool = True) -> None:
        """Start SuperLink, gate, agents and SuperNodes."""
        self.start_superlink()
        if self.gate:
            self.start_gate()
        for i in range(len(self.sites)):
            self.register(i)
            if agents:
                self.start_agent(i)
            self.start_supernode(i, agent=agents)

    # --- Runs -------------------------------------------------------------------------------------

    def begin_run(self, run: Path, rounds: int, **changes: Any) -> subprocess.Popen[bytes]:
        """Start `grandrounds run --engine deployment`."""
        settings = {**self.settings, "num-server-rounds": rounds, **changes}
        return self._run(["--run-dir", str(run), *options(settings)], run.name)

    def resume_run(self, run: Path) -> subprocess.Popen[bytes]:
        """Start `grandrounds run --resume`."""
        return self._run(["--resume", str(run)], f"{run.name}-resumed")

    def _run(self, words: list[str], name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "grandrounds", "run", "--engine", "deployment"]
        return self.start(name, [*command, "--connection", "trial", "--plain", *words])

    def finished(self, process: subprocess.Popen[bytes], seconds: float = 240) -> int:
        """Wait for a run to end; return its exit code."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            logs = {name: self.log(name)[-1500:] for name in self.running}
            raise AssertionError(f"the run did not end: {logs}") from error


def in_process(settings: Settings, run: Path) -> None:
    """Play the same run in this process, with adapters in one array as in a deployment."""
    play(dict(in_one_array(recipes.resolve({**settings, "run-directory": str(run)})).flat()))


def rounds_done(run: Path) -> int:
    """Return the last finished round of a run, or -1 before the base was evaluated."""
    lines = metrics_of(run) if (run / "metrics.jsonl").exists() else []
    return int(lines[-1]["round"]) if lines else -1


def has(*programs: str) -> bool:
    """Return whether programs are installed."""
    return all(shutil.which(program) for program in programs)
