"""A run on real sites: Flower's deployment, through a SuperLink that somebody runs.

The ServerApp runs where the SuperLink runs, and writes the run directory there. On that machine the
run is watched through its files, from elsewhere through its log.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.recipes import to_toml
from grandrounds.config.values import Scalar
from grandrounds.engines.flower import Link, ask, follow, quiet, tail
from grandrounds.engines.watching import Watcher, mark_stopped, with_run_directory, write_app
from grandrounds.errors import ConfigError, EngineError, nearest
from grandrounds.server import admitted
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0
"""How long a SuperLink that does not answer is asked again."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def deploy(config: Config, listener: Listener, connection: str) -> None:
    """Run a configuration on the sites that are connected to a SuperLink.

    Parameters
    ----------
    connection : str
        Name of a connection in Flower's config.toml (`grandrounds consortium init` writes one).

    Raises
    ------
    ConfigError
        If there is no such connection, or no place is named for the run directory of a SuperLink
        elsewhere.
    EngineError
        If the SuperLink does not take the run, is lost, or the run did not complete.
    """
    address = address_of(connection)
    is_here = is_local(address)
    flat = with_run_directory(config)
    given = str(flat["consortium"])
    folder = str(Path(given).expanduser().absolute()) if given else consortium_of(connection)
    flat = {**flat, "consortium": folder}
    if not is_here and not (config.federation.run_directory or config.federation.resume_from):
        raise ConfigError(
            f"The SuperLink of {connection!r} is at {address}, and writes the run directory there: "
            "give its full path on that machine with --run-dir."
        )
    directory = Path(str(flat["resume-from"] or flat["run-directory"]))
    if untied := untied_sites(flat):
        sys.stdout.write(f"{untied}\n")
    home = Path(tempfile.mkdtemp(prefix="grandrounds-flower-"))
    (home / "cwd").mkdir()
    link = Link(home, quiet(), connection)
    watcher = Watcher(directory, listener) if is_here else None
    look = watcher.look if watcher else _relay(home / "run.log")
    with listener:
        try:
            run_id = _start(link, flat, home)
        except EngineError:
            shutil.rmtree(home)
            raise
        try:
            status, reason = follow(link, run_id, look, POLL_SECONDS, PATIENCE_SECONDS)
        except KeyboardInterrupt:
            ask(link, "stop", str(run_id), connection)
            if is_here:
                mark_stopped(RunDirectory(directory))
            raise
        except EngineError as error:
            raise EngineError(
                f"The SuperLink at {address} is lost ({error}). {_how_to_resume(flat, connection)}"
            ) from error
        if watcher and status == "completed" and not directory.exists():  # through a tunnel
            sys.stdout.write(f"completed; {directory} is on the SuperLink's machine\n")
            watcher = None
        summary = watcher.summary() if watcher else {}
        if status != "completed" or (watcher and summary.get("status") != "completed"):
            why = summary.get("reason") or reason.partition("exception: ")[2] or reason
            why = why or tail(home / "run.log", lines=1)
            is_kept = directory.exists() or not is_here
            resume = f"{_how_to_resume(flat, connection)} " if is_kept else ""
            raise EngineError(f"The run ended as {status}: {why} {resume}(log: {home / 'run.log'})")
        if watcher:
            place = {"directory": str(directory), "connection": connection}
            listener.on_finished({**summary, **place})
    shutil.rmtree(home)


def in_one_array(config: Config) -> Config:
    """Return the configuration with adapters that travel as they are in one array.

    Flower moves each array of a message by requests of its own, so that many small ones take
    longer than the visit; the numbers are the same bit for bit.
    """
    how = config.communication
    up, down = (
        "float32" if name == "none" else name for name in (how.uplink_codec, how.downlink_codec)
    )
    how = dataclasses.replace(how, uplink_codec=up, downlink_codec=down)
    return dataclasses.replace(config, communication=how)


def _start(link: Link, flat: Mapping[str, Scalar], home: Path) -> int:
    """Submit the run; return Flower's number of it."""
    app = write_app(home / "app", "grandrounds.engines.deployment.node_app")
    overrides = home / "overrides.toml"
    overrides.write_text(to_toml(flat), encoding="utf-8")
    answer = ask(link, "run", str(app), link.connection, "--run-config", str(overrides))
    return int(answer["run-id"])


def register(public_key: Path, name: str, connection: str) -> int:
    """Let a SuperLink know a site's key; return Flower's id of the node.

    Raises
    ------
    EngineError
        If it does not take the key, or knows it already.
    """
    address_of(connection)
    with tempfile.TemporaryDirectory(prefix="grandrounds-flower-") as folder:
        (Path(folder) / "cwd").mkdir()
        link = Link(Path(folder), quiet(), connection)
        options = ("supernode", "register", str(public_key), connection, "--name", name)
        return int(ask(link, *options)["node-id"])


def _how_to_resume(flat: Mapping[str, Scalar], connection: str) -> str:
    directory = flat["resume-from"] or flat["run-directory"]
    folder = flat["consortium"]
    given = f" --set consortium={folder}" if folder != consortium_of(connection) else ""
    return (
        "Finished rounds are kept; once the SuperLink runs: grandrounds run --resume "
        f"{directory} --engine deployment --connection {connection}{given}"
    )


def _relay(log: Path) -> Callable[[], None]:
    """Return what prints the lines that a log has gained since it was called last."""
    position = 0

    def look() -> None:
        nonlocal position
        if not log.exists():
            return
        size = log.stat().st_size
        position = 0 if size < position else position  # the stream was begun again
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
    """Return the folder of the consortium that a connection's certificate lies in.

    Empty where there is none: it is on another machine.
    """
    certificate = str(entry_of(connection).get("root-certificates", ""))
    folder = Path(certificate).expanduser().parent
    return str(folder) if certificate and (folder / "consortium.json").is_file() else ""


def untied_sites(flat: Mapping[str, Scalar]) -> str:
    """Return a line that names the sites whose number is taken at their word; empty if none is."""
    folder, count = str(flat["consortium"]), int(flat["data.num-partitions"])
    if not folder:
        return (
            "a site's number is taken at its word: no consortium's folder lies beside the "
            "connection's certificate. If there is one where the SuperLink runs: "
            "--set consortium=FOLDER"
        )
    if not Path(folder).is_dir():
        return ""  # on the SuperLink's machine
    tied = admitted.registered_nodes(Path(folder))
    if missing := [str(p) for p in range(count) if p not in tied]:
        return (
            f"taken at their word: sites {', '.join(missing)}. grandrounds consortium admit with "
            "--connection ties a site's number to its key"
        )
    return ""


def address_of(connection: str) -> str:
    """Return the address of a connection; raise `ConfigError` if there is none."""
    return str(entry_of(connection)["address"])


def entry_of(connection: str) -> Mapping[str, Any]:
    """Return a connection in Flower's config.toml, one with an address.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    file = flower_home() / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {})
    except OSError:
        table = {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.") from error
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
    """Whether an address is this machine's own."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES
