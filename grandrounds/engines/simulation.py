"""Flower's simulation of a run: a SuperLink of its own, and the truth about how it ended.

Flower's own `flwr run` starts a SuperLink that outlives it, exits with 0 when the run failed, and
only detaches on Ctrl-C. Here each run has a SuperLink of its own, with its own folder and port, and
how it ended is read from `flwr list`. Everything started carries `MARKER` in its environment (Ray's
daemons and actors inherit it), and whatever carries it is ended before this module returns.

The apps run with our environment in an empty folder, so paths in their configuration must be
absolute. `SystemExit` in a ServerApp counts as *completed* (Flower 1.41, 1.42).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from grandrounds.config.keys import Config
from grandrounds.config.recipes import to_toml
from grandrounds.engines.flower import Link, ask, follow, quiet, require_alive, started, tail
from grandrounds.engines.watching import Watcher, mark_stopped, with_run_directory, write_app
from grandrounds.errors import EngineError
from grandrounds.model.headroom import GPU_SHARE
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener


def simulate(config: Config, listener: Listener, client_cpus: int, client_gpus: float) -> None:
    """Run a configuration in Flower's simulation, on a SuperLink of its own.

    Raises
    ------
    EngineError
        If the run did not complete. Flower's logs are kept then, and named.
    """
    flat = with_run_directory(config)
    run_directory = Path(str(flat["resume-from"] or flat["run-directory"]))
    home = Path(tempfile.mkdtemp(prefix="grandrounds-flower-"))
    app = write_app(home / "app")
    watcher = Watcher(run_directory, listener)
    with listener:
        try:
            outcome = run_simulation(
                app,
                flat,
                num_supernodes=config.data.num_partitions,
                client_cpus=client_cpus,
                client_gpus=client_gpus,
                home=home / "runtime",
                on_poll=watcher.look,
            )
        except KeyboardInterrupt:
            mark_stopped(RunDirectory(run_directory))
            raise
        summary = watcher.summary()
        if outcome.status != "completed" or summary.get("status") != "completed":
            reason = outcome.details.splitlines()[0] if outcome.details else "no reason given"
            raise EngineError(
                f"The simulation ended as {outcome.status}: "
                f"{summary.get('reason') or reason.partition('exception: ')[2] or reason} "
                f"(Flower's logs: {home / 'runtime'})"
            )
        listener.on_finished({**summary, "directory": str(run_directory)})
    shutil.rmtree(home)


def default_gpus() -> float:
    """Return the GPUs of one site where none are asked for: 1 if there is one, since Ray hides
    every GPU from a site that has 0."""
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0


MARKER = "GRANDROUNDS_RUNTIME"
CONNECTION = "grandrounds"  # name of the SuperLink connection in config.toml
END_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class SimulationOutcome:
    """How a simulation ended, in Flower's own words."""

    status: str
    """`"completed"`, `"failed"` or `"stopped"`. Completed: the ServerApp returned, no more."""
    run_id: int
    """Flower's number of the run."""
    details: str
    """Empty if completed, else Flower's reason and the last lines of `run.log`."""


def run_simulation(
    app_dir: Path,
    overrides: Mapping[str, str | int | float | bool],
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
        Folder of this run alone, for Flower's configuration, `superlink.log` and `run.log`.
    on_poll : Callable[[], None]
        Called about every `poll_seconds` while the run lasts. What it raises ends the run.

    Raises
    ------
    EngineError
        If the resources are not there, the SuperLink does not come up or dies in mid-run, Flower
        refuses the app, or a process cannot be ended.
    """
    check_resources(num_supernodes, client_cpus, client_gpus)
    gpu_share = min(1.0, client_gpus) if client_gpus else 1.0
    with superlink(home, start_timeout_seconds, gpu_share) as link:
        overrides_file = link.home / "overrides.toml"
        overrides_file.write_text(to_toml(overrides), encoding="utf-8")
        resources = (
            f"num-supernodes={num_supernodes} client-resources-num-cpus={client_cpus} "
            f"client-resources-num-gpus={client_gpus}"
        )
        options = ("--federation-config", resources, "--run-config", str(overrides_file))
        answer = ask(link, "run", str(app_dir.resolve()), CONNECTION, *options)
        # If this raises, the run ends with its SuperLink: `flwr stop` would only note it there.
        status, reason = follow(link, int(answer["run-id"]), on_poll, poll_seconds)
    log = "" if status == "completed" else tail(home / "run.log")
    return SimulationOutcome(status, int(answer["run-id"]), f"{reason}\n{log}".strip())


def check_resources(num_supernodes: int, client_cpus: float, client_gpus: float) -> None:
    """Raise `EngineError` if this machine cannot host a single ClientApp of that size."""
    cpus, gpus = os.cpu_count() or 1, 0
    if client_gpus:
        import torch  # only here: without GPUs this process needs no torch

        gpus = torch.cuda.device_count()
    asked = f"{num_supernodes} sites, {client_cpus:g} CPUs and {client_gpus:g} GPUs each"
    if num_supernodes < 1 or client_cpus <= 0 or client_gpus < 0:
        raise EngineError(f"A simulation needs at least one site and some CPU; asked: {asked}.")
    if client_cpus > cpus or client_gpus > gpus:
        there = f"{cpus} CPUs" + (f" and {gpus} GPUs that torch can use" if client_gpus else "")
        raise EngineError(f"This machine has {there}; asked: {asked}. Ask for less per site.")


@contextlib.contextmanager
def superlink(
    home: Path, start_timeout_seconds: float = 60, gpu_share: float = 1.0
) -> Iterator[Link]:
    """Start a SuperLink for simulations in `home`; at the end, end all that came of it.

    Parameters
    ----------
    gpu_share : float
        The share of a GPU's memory that each of its sites plans with.
    """
    home = home.resolve()
    (home / "cwd").mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (home / "config.toml").write_text(  # an explicit address: `flwr` starts no SuperLink itself
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', "utf-8"
    )
    # Ray keeps its sockets there, whose paths may not exceed about 100 characters.
    ray_dir = tempfile.mkdtemp(prefix="gr-", dir="/tmp" if Path("/tmp").is_dir() else None)
    environment = _environment(home, ray_dir, gpu_share)
    options = f"--insecure --simulation --host 127.0.0.1 --port {port}"
    command = ("flower-superlink", *options.split())
    try:
        with started(home, environment, "superlink.log", command) as process:
            link = Link(home, environment, CONNECTION, process)
            _wait_until_healthy(link, f"http://127.0.0.1:{port}/health", start_timeout_seconds)
            yield link
    finally:
        in_main = threading.current_thread() is threading.main_thread()  # others get no signals
        # An impatient second Ctrl-C must not break off the clean-up, which takes a few seconds.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
        try:
            end_processes(ray_dir)
            shutil.rmtree(ray_dir, ignore_errors=True)
        finally:
            if in_main:
                signal.signal(signal.SIGINT, previous)


def _environment(home: Path, ray_dir: str, gpu_share: float) -> dict[str, str]:
    """Return our environment with what keeps this run apart, quiet and offline."""
    environment = {key: value for key, value in quiet().items() if key != "RAY_ADDRESS"}
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = f"{environment.get(name, '')},127.0.0.1"
    return environment | {
        MARKER: ray_dir,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": ray_dir,
        GPU_SHARE: str(gpu_share),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _wait_until_healthy(link: Link, url: str, timeout_seconds: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_seconds
    while True:
        require_alive(link)
        with contextlib.suppress(OSError):  # not listening yet
            opener.open(url, timeout=1).close()
            return
        if time.monotonic() > deadline:
            require_alive(link, f"did not answer on {url} within {timeout_seconds:g} seconds")
        time.sleep(0.1)


def end_processes(marker: str) -> None:
    """End every process that carries `marker`, and make sure that none is left."""
    for kill in (False, True):
        deadline = time.monotonic() + END_PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if not (processes := marked_processes(marker)):
                return
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill() if kill else process.terminate()
            time.sleep(0.1)
    pids = [process.pid for process in processes]
    raise EngineError(f"Processes of Flower could not be ended; end them by hand: {pids}.")


def marked_processes(marker: str) -> list[psutil.Process]:
    """Return the living processes that carry `marker` in their environment."""
    found = []
    for process in psutil.process_iter():
        # The processes of others, and zombies, have no environment to read.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                found.append(process)
    return found
