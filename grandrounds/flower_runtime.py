"""Run a Flower app in Flower's Simulation Runtime, and say truthfully how it ended.

Flower's own `flwr run` starts a SuperLink that outlives it, exits with 0 when the run failed, and
only detaches on Ctrl-C. Here each run has a SuperLink of its own, with its own folder and port.
How the run ended is read from `flwr list`. All that is started carries `MARKER` in its environment
(Ray's daemons and actors inherit it), and whatever carries it is ended before this module returns.

What the apps must know (Flower 1.41 and 1.42): ServerApp and ClientApps run with the SuperLink's
environment in an empty folder, so paths in the configuration must be absolute; `SystemExit` in a
ServerApp counts as *completed*.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from grandrounds.errors import EngineError

MARKER = "GRANDROUNDS_RUNTIME"
CONNECTION = "grandrounds"  # name of the SuperLink connection in config.toml
COMMAND_TIMEOUT_SECONDS = 120.0  # for one `flwr` command; it takes 1 to 2 seconds
END_PATIENCE_SECONDS = 5.0

Scalar = str | int | float | bool


@dataclass(frozen=True)
class SimulationOutcome:
    """How a simulation ended, in Flower's own words."""

    status: str
    """`"completed"`, `"failed"` or `"stopped"`. Completed says only that the ServerApp returned:
    whether its rounds went well stands in the run directory."""
    run_id: int
    """Flower's number of the run."""
    details: str
    """Empty if completed, else Flower's reason and the last lines of `run.log`."""


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink of our own."""

    home: Path
    """Its FLWR_HOME, with `config.toml`, `superlink.log` and `run.log`."""
    environment: Mapping[str, str]
    """Environment of every process started for it."""
    process: subprocess.Popen[bytes]
    """The running `flower-superlink`."""


def run_simulation(
    app_dir: Path,
    overrides: Mapping[str, Scalar],
    *,
    num_supernodes: int,
    client_cpus: float = 1,
    client_gpus: float = 0,
    home: Path,
    on_poll: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.5,
    start_timeout_seconds: float = 60,
) -> SimulationOutcome:
    """Run the Flower app in `app_dir` to its end; leave no process behind, however it ends.

    Parameters
    ----------
    app_dir : Path
        Folder whose `pyproject.toml` holds `[tool.flwr.app]`.
    overrides : Mapping[str, str | int | float | bool]
        Changes to `[tool.flwr.app.config]`, keys in dotted form. Flower checks no types.
    num_supernodes : int
        Number of simulated sites, at least 1.
    client_cpus, client_gpus : float
        What one ClientApp actor reserves; they decide how many sites train at the same time.
        Ray sets `OMP_NUM_THREADS` to `client_cpus`, and hides every GPU if `client_gpus` is 0.
    home : Path
        Folder of this run alone, for Flower's configuration and logs.
    on_poll : Callable[[], None]
        Called about every `poll_seconds` while the run lasts. What it raises ends the run.
    poll_seconds, start_timeout_seconds : float
        Pause between two polls; how long the SuperLink may take to answer.

    Raises
    ------
    EngineError
        If the resources are not there, the SuperLink does not come up or dies in mid-run, Flower
        refuses the app, or a process cannot be ended.
    """
    check_resources(num_supernodes, client_cpus, client_gpus)
    with superlink(home, start_timeout_seconds) as link:
        overrides_file = link.home / "overrides.toml"
        overrides_file.write_text(to_toml(overrides), encoding="utf-8")
        resources = (
            f"num-supernodes={num_supernodes} client-resources-num-cpus={client_cpus} "
            f"client-resources-num-gpus={client_gpus}"
        )
        app = ("run", str(app_dir.resolve()), CONNECTION)
        options = ("--federation-config", resources, "--run-config", str(overrides_file))
        run_id = int(_ask(link, *app, *options)["run-id"])
        try:
            status, reason = _follow(link, run_id, on_poll, poll_seconds)
        except BaseException:  # an interrupt too
            # What does not obey is ended with the SuperLink anyway.
            with contextlib.suppress(EngineError):
                _ask(link, "stop", str(run_id), CONNECTION)
            raise
    log = "" if status == "completed" else tail(home / "run.log")
    return SimulationOutcome(status, run_id, "\n".join(filter(None, [reason, log])))


def check_resources(num_supernodes: int, client_cpus: float, client_gpus: float) -> None:
    """Raise `EngineError` if this machine cannot host a single ClientApp of that size."""
    cpus, gpus = os.cpu_count() or 1, 0
    if client_gpus:
        import torch  # only here: without GPUs this process needs no torch

        gpus = torch.cuda.device_count()
    asked = f"{num_supernodes} sites, {client_cpus:g} CPUs and {client_gpus:g} GPUs each"
    if num_supernodes < 1 or client_cpus <= 0 or client_gpus < 0:
        raise EngineError(f"A simulation needs at least one site and some CPU; asked: {asked}.")
    if client_gpus > 1 and client_gpus != int(client_gpus):
        raise EngineError(f"Ray gives a part of one GPU or whole GPUs; asked: {asked}.")
    if client_cpus > cpus or client_gpus > gpus:
        there = f"{cpus} CPUs" + (f" and {gpus} GPUs that torch can use" if client_gpus else "")
        raise EngineError(f"This machine has {there}; asked: {asked}. Ask for less per site.")


def to_toml(values: Mapping[str, Scalar]) -> str:
    """Return `values` as TOML with quoted keys; Flower reads `"a.b"` like `b` in table `a`."""
    return "".join(f"{_literal(key)} = {_literal(value)}\n" for key, value in values.items())


def _literal(value: Scalar) -> str:
    if isinstance(value, str):  # JSON's strings are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a log, without terminal colours and empty lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])


@contextlib.contextmanager
def superlink(home: Path, start_timeout_seconds: float = 60) -> Iterator[SuperLink]:
    """Start a SuperLink for simulations in `home`; at the end, end all that came of it."""
    home = home.resolve()
    (home / "cwd").mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # An explicit address: `flwr` then starts no SuperLink by itself.
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    # Ray keeps its sockets there, whose paths may not exceed about 100 characters.
    ray_dir = tempfile.mkdtemp(prefix="gr-", dir="/tmp" if Path("/tmp").is_dir() else None)
    marker = uuid.uuid4().hex
    environment = _environment(home, marker, ray_dir)
    arguments = ("--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port))
    process = None
    try:
        process = _start(home, environment, "superlink.log", "flower-superlink", *arguments)
        link = SuperLink(home, environment, process)
        _wait_until_healthy(link, port, start_timeout_seconds)
        yield link
    finally:
        with _interrupts_ignored():
            end_processes(marker)
            if process:
                process.wait()
            shutil.rmtree(ray_dir, ignore_errors=True)


def _environment(home: Path, marker: str, ray_dir: str) -> dict[str, str]:
    """Return our environment with what keeps this run apart, quiet and offline."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    no_proxy = {name: f"{environment.get(name, '')},127.0.0.1" for name in ("NO_PROXY", "no_proxy")}
    return (
        environment
        | no_proxy
        | {
            MARKER: marker,
            # Flower finds its own programs (flower-superexec, flwr-simulation) on PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "RAY_TMPDIR": ray_dir,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
    )


def _start(
    home: Path, environment: Mapping[str, str], log_name: str, program: str, *arguments: str
) -> subprocess.Popen[bytes]:
    """Start a program of Flower in a session of its own (Ctrl-C is ours to handle) and log it."""
    path = shutil.which(program, path=environment["PATH"])
    if path is None:
        raise EngineError(
            f"The program {program!r} is neither beside {sys.executable} nor on PATH. "
            "Install it with: pip install 'grandrounds[all]'"
        )
    with (home / log_name).open("wb") as log:
        return subprocess.Popen(
            [path, *arguments],
            env=dict(environment),
            cwd=home / "cwd",  # empty: Ray's actors import from here first
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_healthy(link: SuperLink, port: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        _require_alive(link)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)  # not listening yet
        finally:
            connection.close()
    log = link.home / "superlink.log"
    raise EngineError(
        f"Flower's SuperLink did not answer on 127.0.0.1:{port} within {timeout_seconds:g} "
        f"seconds. If the machine is busy, try again. The end of {log}:\n{tail(log)}"
    )


def _require_alive(link: SuperLink) -> None:
    if (code := link.process.poll()) is not None:
        log = link.home / "superlink.log"
        raise EngineError(
            f"Flower's SuperLink ended with code {code} while it was needed. Look for the cause "
            f"(often memory) and resume the run. The end of {log}:\n{tail(log)}"
        )


def _ask(link: SuperLink, *arguments: str) -> dict[str, Any]:
    """Run one `flwr` command and return its JSON answer; its exit code says nothing."""
    log = link.home / "flwr.log"
    command = (*arguments, "--format", "json")
    process = _start(link.home, link.environment, log.name, "flwr", *command)
    try:
        process.wait(COMMAND_TIMEOUT_SECONDS)
        text = log.read_text(encoding="utf-8", errors="replace")
        answer: dict[str, Any] = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        answer = {"error-message": tail(log)}
    finally:
        process.kill()
        process.wait()
    if not answer.get("success"):
        raise EngineError(f"Flower refused `flwr {arguments[0]}`: {answer.get('error-message')}")
    return answer


def _follow(
    link: SuperLink, run_id: int, on_poll: Callable[[], None], poll_seconds: float
) -> tuple[str, str]:
    """Wait for the end of a run; return Flower's sub-status and reason.

    A child copies the run's log to `run.log` and ends when the run has finished: asking `flwr
    list` at every poll would cost a second of CPU each time. Then `flwr list` is asked for the
    truth; if the stream had merely broken, it is begun again.
    """
    while True:
        stream = _start(
            link.home, link.environment, "run.log", "flwr", "log", str(run_id), CONNECTION
        )
        try:
            while stream.poll() is None:
                _require_alive(link)
                on_poll()
                time.sleep(poll_seconds)
        finally:
            stream.kill()
            stream.wait()
        _require_alive(link)
        [run] = _ask(link, "list", CONNECTION, "--run-id", str(run_id))["runs"]
        on_poll()
        status, _, sub_status = run["status"].partition(":")
        if status == "finished":
            reason = run["status-details"]
            return sub_status, "" if reason == "N/A" else reason


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let an impatient second Ctrl-C not break off the clean-up, which takes a few seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def end_processes(marker: str) -> None:
    """End every process that carries `marker`: terminate, wait, kill, and look again."""
    for kill in (False, True, True):
        processes = marked_processes(marker)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if kill else process.terminate()
        psutil.wait_procs(processes, timeout=END_PATIENCE_SECONDS)
    if survivors := sorted(process.pid for process in marked_processes(marker)):
        raise EngineError(f"Processes of Flower could not be ended; end them by hand: {survivors}.")


def marked_processes(marker: str) -> set[psutil.Process]:
    """Return the living processes that carry `marker` in their environment, and descendants."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        # Others' processes, kernel threads and zombies have no environment to read.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                found |= {process, *process.children(recursive=True)}
    return found
