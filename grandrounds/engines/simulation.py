"""Flower's simulation of a run, on a SuperLink that starts and ends with it.

Flower's own `flwr run` starts a SuperLink that outlives it, exits with 0 when the run failed, and
only detaches on Ctrl-C. Here each run has its own SuperLink, with its own folder and port, and its
outcome is read from `flwr list`. The SuperLink and all that comes of it live below a keeper
(`engines/keeper.py`), which ends them before this module returns, and also if this process is
killed; their folder is removed with them (`engines/folders.py`).

The apps run with our environment in an empty folder, so paths in their configuration must be
absolute. `SystemExit` in a ServerApp counts as *completed* (Flower 1.41, 1.42).
"""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.keys import Config
from grandrounds.config.recipes import to_toml
from grandrounds.config.values import Scalar
from grandrounds.config.words import command, counted
from grandrounds.engines.flower import Link, ask, follow, kept, quiet, require_alive
from grandrounds.engines.folders import Folder, own_folder
from grandrounds.engines.keeper import MARKER
from grandrounds.engines.watching import (
    Watcher,
    kept_logs,
    mark_stopped,
    why_it_ended,
    with_run_directory,
    write_app,
)
from grandrounds.errors import EngineError
from grandrounds.model.headroom import GPU_SHARE
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener
from grandrounds.waiting import usable_cpus

CONNECTION = "grandrounds"  # name of the SuperLink connection in config.toml
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SimulatedSites:
    """The sites of a simulation, and what Ray reserves for each: that decides how many run at once.

    Ray sets `OMP_NUM_THREADS` to `cpus`, and hides every GPU from a site with `gpus` 0.
    """

    count: int
    cpus: float = 1
    gpus: float = 0

    def check(self) -> None:
        """Raise `EngineError` if this process cannot host a single site of that size."""
        cpus, gpus = usable_cpus(), 0
        if self.gpus:
            import torch  # only here: without GPUs this process needs no torch

            gpus = torch.cuda.device_count()
        asked = f"{self.count} sites, {self.cpus:g} CPUs and {self.gpus:g} GPUs each"
        if self.count < 1 or self.cpus <= 0 or self.gpus < 0:
            raise EngineError(f"A simulation needs at least one site and some CPU, not {asked}.")
        if self.cpus > cpus or self.gpus > gpus:
            there = counted(cpus, "CPU") + (f" and {gpus} usable GPUs" if self.gpus else "")
            raise EngineError(f"This process may use {there}, not {asked}. Reserve less per site.")

    @property
    def resources(self) -> str:
        """Flower's `--federation-config`. Ray's own count of CPUs ignores the affinity."""
        return (
            f"num-supernodes={self.count} client-resources-num-cpus={self.cpus} "
            f"client-resources-num-gpus={self.gpus} init-args-num-cpus={usable_cpus()}"
        )

    @property
    def gpu_share(self) -> float:
        """Fraction of a GPU's memory that each site may plan with."""
        return min(1.0, self.gpus) if self.gpus else 1.0


def simulate(config: Config, listener: Listener, client_cpus: int, client_gpus: float) -> None:
    """Run a configuration in Flower's simulation, on its own SuperLink.

    Raises
    ------
    EngineError
        If the run did not complete. Flower's logs are then in the run directory, if there is one.
    """
    flat, directory = with_run_directory(config)
    sites = SimulatedSites(config.data.num_partitions, client_cpus, client_gpus)
    watcher = Watcher(directory, listener)
    with own_folder() as folder, listener:
        app = write_app(folder.path / "app")
        try:
            status, reason = run_simulation(app, flat, sites, folder, watcher.look)
        except KeyboardInterrupt:
            mark_stopped(RunDirectory(directory))
            raise
        except EngineError as error:
            raise EngineError(f"{error} {kept_logs(folder.path, directory)}".rstrip()) from error
        summary = watcher.summary()
        if status != "completed" or summary.get("status") != "completed":
            why = why_it_ended(summary, reason, folder.path / "run.log")
            kept = (
                "Finished rounds are kept: "
                f"{command('grandrounds', 'run', '--resume', directory)} --engine simulation "
            ) * directory.exists()
            logs = kept_logs(folder.path, directory)
            raise EngineError(f"The simulation ended as {status}: {why} {kept}{logs}".rstrip())
        place = {"directory": str(directory), "engine": "simulation"}
        listener.on_finished({**summary, **place})


def default_cpus(num_threads: int) -> int:
    """Return the default CPUs per site: one for each of its threads, so that sites which run at
    once do not share CPUs; at most those that this process may use."""
    return min(max(1, num_threads), usable_cpus())


def default_gpus(devices: int = 1) -> float:
    """Return the default GPUs per site: `train.devices`, or as many as there are, since Ray hides
    all others from a site. Of N GPUs, N / `devices` sites run at once, each with a base of its own.
    """
    import torch

    return float(min(devices, torch.cuda.device_count())) if torch.cuda.is_available() else 0.0


def run_simulation(
    app_dir: Path,
    overrides: Mapping[str, Scalar],
    sites: SimulatedSites,
    folder: Folder,
    on_poll: Callable[[], None] = lambda: None,
) -> tuple[str, str]:
    """Run the Flower app in `app_dir` to its end; leave no process behind, however it ends.

    Parameters
    ----------
    app_dir : Path
        Folder whose `pyproject.toml` holds `[tool.flwr.app]`.
    overrides : Mapping[str, Scalar]
        Changes to `[tool.flwr.app.config]`, under dotted keys. Flower checks no types.
    folder : Folder
        For this run only: Flower's configuration, `superlink.log` and `run.log`.
    on_poll : Callable[[], None]
        Called about every `POLL_SECONDS` while the run lasts. An exception in it ends the run.

    Returns
    -------
    tuple[str, str]
        `"completed"` (the ServerApp returned, no more), `"failed"` or `"stopped"`; Flower's reason.

    Raises
    ------
    EngineError
        If the resources are not available, the SuperLink does not start or dies during the run,
        Flower rejects the app, or a process cannot be ended.
    """
    sites.check()
    with superlink(folder, gpu_share=sites.gpu_share) as link:
        overrides_file = link.home / "overrides.toml"
        overrides_file.write_text(to_toml(overrides), encoding="utf-8")
        options = ("--federation-config", sites.resources, "--run-config", str(overrides_file))
        answer = ask(link, "run", str(app_dir.resolve()), CONNECTION, *options)
        # If this raises, the run ends with its SuperLink: `flwr stop` would only note it there.
        return follow(link, int(answer["run-id"]), on_poll, POLL_SECONDS)


@contextlib.contextmanager
def superlink(
    folder: Folder, start_timeout_seconds: float = 60, gpu_share: float = 1.0
) -> Iterator[Link]:
    """Run a SuperLink for simulations in a folder; on exit, end every process that it started.

    Parameters
    ----------
    gpu_share : float
        Fraction of a GPU's memory that each site may plan with.
    """
    home = folder.path
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (home / "config.toml").write_text(  # an explicit address: `flwr` starts no SuperLink itself
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', "utf-8"
    )
    environment = _environment(home, gpu_share)
    options = f"--insecure --simulation --host 127.0.0.1 --port {port}"
    command = ("flower-superlink", *options.split())
    with kept(folder, environment, "superlink.log", command) as keeper:
        link = Link(home, environment, CONNECTION, keeper)
        _wait_until_healthy(link, f"http://127.0.0.1:{port}/health", start_timeout_seconds)
        yield link


def _environment(home: Path, gpu_share: float) -> dict[str, str]:
    """Return our environment, changed so that this run is isolated, quiet and local."""
    environment = {key: value for key, value in quiet().items() if key != "RAY_ADDRESS"}
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = f"{environment.get(name, '')},127.0.0.1"
    return environment | {
        MARKER: str(home),
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
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
