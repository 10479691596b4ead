"""A consortium whose server and sites are processes of this machine, as a rehearsal runs it.

Certificates, keys, admissions and site files are those of a real consortium; only the gate is
missing, since nothing listens outside loopback. All processes live below one keeper, which ends
them with the block that started them, and also if this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds import storage
from grandrounds.config.keys import Config
from grandrounds.data.partitioning import Division, Partition, partition_rows
from grandrounds.data.sources import load_rows
from grandrounds.engines.deployment import admissions, joining, launcher, set_up
from grandrounds.engines.deployment.server_checks import asked_over_tls
from grandrounds.engines.deployment.superlink import register
from grandrounds.engines.flower import kept, quiet, tail
from grandrounds.engines.folders import Folder
from grandrounds.engines.keeper import MARKER
from grandrounds.errors import ConfigError, EngineError
from grandrounds.site.custody.site_file import SiteFile, read_site_file

HOST = "127.0.0.1"
NAME = "demo"
"""Name of the consortium, and of the connection to its SuperLink."""

START_SECONDS = 180.0
"""How long a process may take to start: on a busy machine torch alone takes a while."""

POLL_SECONDS = 0.1
ATTEMPTS = 3
"""How often a program is started on other ports where another process has taken its port."""

MOST_SOCKET_BYTES = 100
"""Length of a Unix socket's path that every system allows."""


def free_port(count: int = 1) -> int:
    """Return the first of `count` consecutive free ports of loopback; nobody reserves them."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
        try:
            for i in range(1, count):
                with socket.socket() as probe:
                    probe.bind((HOST, port + i))
        except OSError:
            continue
        return port


def is_open(host: str, port: int) -> bool:
    """Return whether something listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def is_taken(port: int, count: int = 2) -> bool:
    """Return whether a process listens on one of `count` consecutive ports of loopback.

    Flower's programs end without a reason if their port is taken.
    """
    return any(is_open(HOST, port + i) for i in range(count))


# --- Files ----------------------------------------------------------------------------------------


def write_partition(file: Path, config: Config, partition_id: int) -> int:
    """Write the rows that a run assigns to one of its sites, in order; return their number.

    Raises
    ------
    DataError
        If the run's data cannot be read.
    """
    data = config.data
    rows = load_rows(
        config.static.name, question_column=data.question_column, answer_column=data.answer_column
    )
    partition = Partition(config.federation.seed, partition_id, data.num_partitions)
    part = partition_rows(rows, Division("iid", "", 0.5), partition)
    pairs = zip(part[data.question_column], part[data.answer_column], strict=True)
    lines = [json.dumps({"input": q, "output": a}) + "\n" for q, a in pairs]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def fill_in(file: Path, values: Mapping[str, Any], bases: Mapping[str, str]) -> None:
    """Fill in a site.toml.

    Parameters
    ----------
    values
        `section.key` → its value.
    bases
        Name of a further base → its path; empty: the embedded base.
    """
    text = file.read_text(encoding="utf-8")
    for name, value in values.items():
        section, _, key = name.partition(".")
        text = set_up.with_value(text, section, key, value)
    for name, path in bases.items():
        text += f"\n[bases.{json.dumps(name)}]\npath = {json.dumps(path)}\n"
    file.write_text(text, encoding="utf-8")


def without_gate(home: Path, superlink: str) -> None:
    """Let the admissions of a consortium name its SuperLink, host:port, in place of the gate."""
    described = storage.read_json(home / "consortium.json")
    storage.write_json(home / "consortium.json", {**described, "superlink": superlink})


def joined_site(home: Path, folder: Path, number: tuple[int, int]) -> SiteFile:
    """Admit a site of this machine to a consortium of this machine, and join with the admission.

    Parameters
    ----------
    home, folder : Path
        Folder of the consortium, and of the site, which `init_site` has made.
    number : tuple of int
        Its partition id, and the number of sites.
    """
    admission = admissions.admit(home, folder / "request.json", *number)
    file = folder / "site.toml"
    joining.join(read_site_file(file), admission, home / "authority.pub")
    return read_site_file(file)


# --- Processes ------------------------------------------------------------------------------------


@dataclass
class Program:
    """A program of a local consortium, on a port that was free."""

    name: str
    command: Callable[[int], list[str]]
    """Port → its command."""
    port: int
    attempt: int = 1
    """How often it was started."""

    @property
    def key(self) -> str:
        """Its name in the launcher's folders."""
        return f"{self.name}.{self.attempt}"


@dataclass
class Processes:
    """The programs of a consortium, which a launcher starts below a keeper."""

    folder: Path
    """Of the launcher."""
    logs: Path
    """Folder of their logs."""

    def begin(self, name: str, command: Callable[[int], list[str]]) -> Program:
        """Start a program on a free port, its output in `NAME.log`; `finish` waits for it."""
        return self._start(Program(name, command, free_port(2)))

    def _start(self, program: Program) -> Program:
        asked = {"command": program.command(program.port), "log": str(self.log(program))}
        launcher.note(self.folder, launcher.START, f"{program.key}.json", json.dumps(asked))
        return program

    def log(self, program: Program) -> Path:
        """Return the log of a program."""
        return self.logs / f"{program.name}.log"

    def said(self, program: Program) -> str:
        """Return what a program has printed."""
        log = self.log(program)
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def finish(self, program: Program, is_up: Callable[[Program], bool]) -> Program:
        """Wait until a program is up; start it on another port if its own was taken meanwhile.

        Raises
        ------
        EngineError
            If it ended for another reason, or is not up in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = self.folder / launcher.ENDED / program.key
            if ended.exists():
                if program.attempt == ATTEMPTS or not is_taken(program.port):
                    raise EngineError(self._why(program, f"ended with code {ended.read_text()}"))
                again = Program(program.name, program.command, free_port(2), program.attempt + 1)
                program = self._start(again)
            elif is_up(program):
                return program
            if time.monotonic() > deadline:
                raise EngineError(self._why(program, f"is not up after {START_SECONDS:.0f} s"))
            time.sleep(POLL_SECONDS)

    def _why(self, program: Program, what: str) -> str:
        end = tail(self.log(program), 5).replace("\n", " | ")
        return f"{program.name} {what}; the end of its log: {end or 'nothing'}. Run again."


@contextlib.contextmanager
def processes(folder: Folder, home: Path) -> Iterator[Processes]:
    """Start programs until the block ends, in an environment of their own; then end them all.

    Parameters
    ----------
    folder : Folder
        Of this command: the keeper's marker and the launcher's files.
    home : Path
        Folder of the consortium's parts; Flower's own is `flwr` below it, the logs are in `logs`.
    """
    own = {
        MARKER: str(folder.path),
        "FLWR_HOME": str(home / "flwr"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder.path),  # where a keeper finds what a killed command leaves
    }
    for name in ("flwr", "logs"):
        (home / name).mkdir(exist_ok=True)
    words = [sys.executable, "-P", launcher.__file__, str(folder.path)]
    with _environment(own), kept(folder, quiet(), "launcher.log", words):
        yield Processes(folder.path, home / "logs")


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, which the commands that it starts inherit, meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    place = tempfile.tempdir
    os.environ.update(values)
    tempfile.tempdir = None  # read anew
    try:
        yield
    finally:
        tempfile.tempdir = place
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start_superlink(running: Processes, home: Path) -> tuple[Path, Program]:
    """Set up a consortium and start its SuperLink; return the consortium's folder with it.

    For another port everything is made anew, since the consortium's files name it.
    """
    folder = home / "consortium"

    def command(port: int) -> list[str]:
        shutil.rmtree(folder, ignore_errors=True)
        set_up.init_consortium(folder, NAME, HOST, port)
        without_gate(folder, f"{HOST}:{port + 1}")
        entry = (folder / "flower-config.toml").read_text(encoding="utf-8")
        (home / "flwr" / "config.toml").write_text(entry, encoding="utf-8")
        return set_up.superlink_command(folder, port)

    def is_up(superlink: Program) -> bool:
        with contextlib.suppress(OSError):  # not yet, or another process with its own certificate
            return asked_over_tls(HOST, superlink.port + 1, folder / "ca.crt")[0] == 200
        return False

    return folder, running.finish(running.begin("superlink", command), is_up)


def start_agents(running: Processes, sites: Sequence[SiteFile]) -> list[Program]:
    """Start the agent of each site."""

    def command(site: SiteFile) -> Callable[[int], list[str]]:
        words = ["grandrounds", "site", "serve", "--config", str(site.path)]
        return lambda _: [sys.executable, "-m", *words]

    return [running.begin(f"{site.name}-agent", command(site)) for site in sites]


def wait_for_agents(running: Processes, agents: Sequence[Program]) -> None:
    """Wait until all agents serve."""
    for agent in agents:
        running.finish(agent, lambda one: "listens on" in running.said(one))


def connect(running: Processes, sites: Sequence[SiteFile], home: Path) -> None:
    """Register each site's key and start its SuperNode; wait until all are connected.

    Parameters
    ----------
    home : Path
        Folder of the consortium.
    """

    def command(site: SiteFile) -> Callable[[int], list[str]]:
        return lambda port: set_up.supernode_command(site, port)

    begun = []
    for site in sites:
        admission = home / "admissions" / f"{site.name}.json"
        admissions.note_node(admission, register(admission.with_suffix(".pub"), site.name, NAME))
        begun.append(running.begin(f"{site.name}-supernode", command(site)))
    for supernode in begun:
        running.finish(supernode, lambda one: "SuperNode ID:" in running.said(one))


def check_place(home: Path, names: list[str]) -> None:
    """Raise `ConfigError` if the agents' sockets would have paths that are too long."""
    longest = max((home / name / "agent.sock" for name in names), key=lambda p: len(os.fsencode(p)))
    if len(os.fsencode(longest)) > MOST_SOCKET_BYTES:
        raise ConfigError(
            f"--folder {home}: the agents' sockets would be at {longest}, longer than the "
            f"{MOST_SOCKET_BYTES} bytes of a Unix socket's path. Choose a shorter folder."
        )
