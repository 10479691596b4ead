"""A run on real sites, through an existing SuperLink of Flower's deployment.

The ServerApp runs on the SuperLink's machine and writes the run directory there. On that machine
the run is watched through its files, from elsewhere through its log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import to_toml
from grandrounds.config.values import Scalar
from grandrounds.config.words import command
from grandrounds.engines.deployment.admissions import check_revocations, timestamp
from grandrounds.engines.deployment.set_up import DATABASE
from grandrounds.engines.deployment.tidy import rewritten
from grandrounds.engines.flower import Link, ask, follow, quiet
from grandrounds.engines.folders import own_folder
from grandrounds.engines.watching import (
    Watcher,
    kept_logs,
    mark_stopped,
    why_it_ended,
    with_run_directory,
    write_app,
)
from grandrounds.errors import ConfigError, EngineError, first_line, nearest
from grandrounds.server import admitted
from grandrounds.server.directory import RESUME_WITH, RunDirectory
from grandrounds.server.listeners import Listener
from grandrounds.server.masks.rosters import check_roster
from grandrounds.storage import read_toml, write_json

POLL_SECONDS = 0.5
LAST_RUN = "last-run.json"
"""File of a consortium: directory, Flower's number and start of the run that was begun last."""

PATIENCE_SECONDS = 30.0
"""How long to retry if the SuperLink does not answer."""


def deploy(config: Config, listener: Listener, connection: str) -> None:
    """Run a configuration on the sites that are connected to a SuperLink.

    Parameters
    ----------
    connection : str
        Name of a connection in Flower's config.toml (`grandrounds consortium init` prints one).

    Raises
    ------
    ConfigError
        If there is no such connection, or no run directory is given for a remote SuperLink.
    EngineError
        If the SuperLink rejects the run or is lost, or the run did not complete.
    """
    address = str(entry_of(connection)["address"])
    is_here = is_local(address)
    flat, directory = with_run_directory(config)
    given = config.federation.consortium
    default = consortium_of(connection)
    folder = str(Path(given).expanduser().absolute()) if given else default
    flat["consortium"] = folder
    if not is_here and not (config.federation.run_directory or config.federation.resume_from):
        raise ConfigError(
            f"The SuperLink of {connection!r} at {address} writes the run directory on its own "
            "machine: give its absolute path there with --run-dir."
        )
    if folder and Path(folder).is_dir():
        check_revocations(Path(folder))
        federation = dataclasses.replace(config.federation, consortium=folder)
        check_roster(dataclasses.replace(config, federation=federation))
    if config.is_masked and not folder:
        raise ConfigError(
            f"secure-aggregation = {config.federation.secure_aggregation!r} needs the consortium's "
            "folder, with the roster of the sites' agent keys, and there is none beside the "
            "connection's certificate. If it is on the SuperLink's machine: --set consortium=FOLDER"
        )
    if untied := untied_sites(folder, config.data.num_partitions):
        sys.stdout.write(f"{untied}\n")
    words = ["grandrounds", "run", "--resume", directory]
    words += ["--engine", "deployment", "--connection", connection]
    words += ["--set", f"consortium={folder}"] if folder != default else []
    kept, resume = "Finished rounds, if any, are kept", command(*words)
    watcher = Watcher(directory, listener) if is_here else None
    with own_folder() as own, listener:
        home, log = own.path, own.path / "run.log"
        link = Link(home, quiet(), connection)
        run_id = _start(link, flat, home)
        if is_here and folder and Path(folder).is_dir():
            _note_run(Path(folder), directory, run_id)
        try:
            look = watcher.look if watcher else _relay(log)
            status, reason = follow(link, run_id, look, POLL_SECONDS, PATIENCE_SECONDS)
        except KeyboardInterrupt:
            ask(link, "stop", str(run_id), connection)
            if is_here:
                mark_stopped(RunDirectory(directory))
            raise
        except EngineError as error:
            told = f"The SuperLink at {address} is lost ({error}). {kept}; once it runs again: "
            raise EngineError(told + resume) from error
        _tidy(folder, link)
        if watcher and status == "completed" and not directory.exists():  # through a tunnel
            sys.stdout.write(f"completed; {directory} is on the SuperLink's machine\n")
            watcher = None
        summary = watcher.summary() if watcher else {}
        if status != "completed" or (watcher and summary.get("status") != "completed"):
            why = why_it_ended(summary, reason, log)
            advice = f"{kept}{RESUME_WITH}{resume} " if directory.exists() or not is_here else ""
            logs = kept_logs(home, directory) if watcher else ""  # elsewhere, it has been shown
            raise EngineError(f"The run ended as {status}: {why} {advice}{logs}".rstrip())
        if watcher:
            place = {"directory": str(directory), "connection": connection}
            listener.on_finished({**summary, **place})


def _tidy(folder: str, link: Link) -> None:
    """Remove a finished run's updates from the SuperLink's database, if it is on this machine.

    Flower has deleted them when it was asked how the run ended.
    """
    if not folder or not (Path(folder) / DATABASE).is_file():
        return
    try:
        rewritten(Path(folder) / DATABASE)
    except EngineError as error:
        tidy = command("grandrounds", "consortium", "tidy", "--connection", link.connection)
        sys.stderr.write(
            f"grandrounds: the SuperLink's database may still contain updates: {error} Then: "
            f"{tidy} {command('--dir', Path(folder))}\n"
        )


def in_one_array(config: Config) -> Config:
    """Return the configuration with uncompressed adapters sent as a single array.

    Flower transfers each array of a message in separate requests, so that many small arrays take
    longer than the visit. The values are bit-for-bit the same.
    """
    how = config.communication
    up, down = (
        "float32" if name == "none" else name for name in (how.uplink_codec, how.downlink_codec)
    )
    if config.is_masked:  # whose vectors are one array already
        up = how.uplink_codec
    how = dataclasses.replace(how, uplink_codec=up, downlink_codec=down)
    return dataclasses.replace(config, communication=how)


def _start(link: Link, flat: Mapping[str, Scalar], home: Path) -> int:
    """Submit the run; return Flower's run id."""
    app = write_app(home / "app", "grandrounds.engines.deployment.node_app")
    overrides = home / "overrides.toml"
    overrides.write_text(to_toml(flat), encoding="utf-8")
    answer = ask(link, "run", str(app), link.connection, "--run-config", str(overrides))
    return int(answer["run-id"])


def _note_run(folder: Path, directory: Path, run_id: int) -> None:
    """Record the consortium's last run for `grandrounds consortium status`."""
    noted = {"directory": str(directory), "flower-run": str(run_id), "started": timestamp()}
    try:
        write_json(folder / LAST_RUN, noted)
    except OSError as error:  # the run has begun, and does not need the file
        sys.stderr.write(
            f"grandrounds: {folder / LAST_RUN} cannot be written ({first_line(error)}): "
            "grandrounds consortium status will not know this run\n"
        )


def register(public_key: Path, name: str, connection: str) -> int:
    """Register a site's key with a SuperLink; return Flower's node id.

    Raises
    ------
    EngineError
        If the SuperLink rejects the key, or already knows it.
    """
    with linked(connection) as link:
        options = ("supernode", "register", str(public_key), connection, "--name", name)
        return int(ask(link, *options)["node-id"])


def unregister(node: int, connection: str) -> None:
    """Unregister a node from a SuperLink, which then answers none of its requests.

    Raises
    ------
    EngineError
        If the SuperLink does not answer, or does not know the node.
    """
    with linked(connection) as link:
        ask(link, "supernode", "unregister", str(node), connection)


@contextlib.contextmanager
def linked(connection: str) -> Iterator[Link]:
    """Yield a link to a SuperLink for a few commands; raise `ConfigError` if it is not known."""
    entry_of(connection)
    with own_folder() as own:
        yield Link(own.path, quiet(), connection)


def _relay(log: Path) -> Callable[[], None]:
    """Return a function that prints the lines added to a log since its last call."""
    position = 0

    def look() -> None:
        nonlocal position
        if not log.exists():
            return
        size = log.stat().st_size
        position = 0 if size < position else position  # the stream was restarted
        with log.open("rb") as file:
            file.seek(position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        position += len(whole)
        sys.stdout.write(whole.decode(errors="replace"))
        sys.stdout.flush()

    return look


def flower_home() -> Path:
    """Return the folder of Flower's configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").expanduser()


def consortium_of(connection: str) -> str:
    """Return the consortium folder that holds a connection's certificate; empty if it is remote."""
    certificate = str(entry_of(connection).get("root-certificates", ""))
    folder = Path(certificate).expanduser().parent
    return str(folder) if certificate and (folder / "consortium.json").is_file() else ""


def untied_sites(folder: str, count: int) -> str:
    """Return a line naming the sites whose partition id is unverified; empty if there are none."""
    if not folder:
        return (
            "partition ids are unverified: there is no consortium folder beside the connection's "
            "certificate. If it is on the SuperLink's machine: --set consortium=FOLDER"
        )
    if not Path(folder).is_dir():
        return ""  # on the SuperLink's machine
    tied = admitted.registered_nodes(Path(folder))
    if missing := [str(p) for p in range(count) if p not in tied]:
        return (
            f"unverified partition ids: {', '.join(missing)}. grandrounds consortium admit with "
            "--connection binds a partition id to the site's key"
        )
    return ""


def entry_of(connection: str) -> Mapping[str, Any]:
    """Return a connection in Flower's config.toml.

    Raises
    ------
    ConfigError
        If there is none of that name with an address.
    """
    file = flower_home() / "config.toml"
    table = read_toml(file).get("superlink", {}) if file.is_file() else {}
    found = table.get(connection)
    if not isinstance(found, Mapping) or not found.get("address"):
        known = [name for name, entry in table.items() if isinstance(entry, Mapping)]
        raise ConfigError(
            f"--connection {connection!r}: {file} has no [superlink.{connection}] with an address."
            f"{nearest(connection, known)} It has: {', '.join(known) or 'none'}. grandrounds "
            "consortium init prints an entry."
        )
    return found


def is_local(address: str) -> bool:
    """Whether an address is on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
