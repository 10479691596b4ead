"""Flower's own commands, run by us: in our environment, in an empty folder, their output in a log.

`flwr` exits with 0 whatever happened; the truth is in its JSON answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grandrounds.errors import EngineError

COMMAND_TIMEOUT_SECONDS = 120.0  # for one `flwr` command; it takes 1 to 2 seconds


@dataclass(frozen=True)
class Link:
    """How Flower's commands reach a SuperLink."""

    home: Path
    """Where logs are written; it holds an empty folder `cwd`."""
    environment: Mapping[str, str]
    """Of the commands; `FLWR_HOME` in it says where the connection is described."""
    connection: str
    """Name of the connection in Flower's config.toml."""
    process: subprocess.Popen[bytes] | None = None
    """The SuperLink, where it was started for this run."""


def quiet() -> dict[str, str]:
    """Return our environment, where Flower finds its programs, tells nobody, installs nothing."""
    return os.environ | {
        # Flower finds its own programs (flower-superexec, flwr-simulation) on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a log, without terminal colours and empty lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return "\n".join([line.rstrip() for line in plain if line.strip()][-lines:])


@contextlib.contextmanager
def started(
    home: Path, environment: Mapping[str, str], log_name: str, command: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of Flower, its output in a log, until the block ends."""
    path = shutil.which(command[0], path=environment["PATH"])
    if path is None:
        raise EngineError(f"{command[0]!r} is not on PATH; pip install 'grandrounds[all]'")
    with (home / log_name).open("wb") as log:
        process = subprocess.Popen(
            [path, *command[1:]],
            env=dict(environment),
            cwd=home / "cwd",  # empty: Ray's actors import from here first
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def require_alive(link: Link, problem: str = "") -> None:
    """Raise `EngineError` if the SuperLink that was started for this run has ended, or for a
    problem with it."""
    if link.process is not None and (code := link.process.poll()) is not None:
        problem = f"ended with code {code} (too little memory?)"
    if problem:
        log = link.home / "superlink.log"
        raise EngineError(f"Flower's SuperLink {problem}. Run again. End of {log}:\n{tail(log)}")


def ask(link: Link, *arguments: str) -> dict[str, Any]:
    """Run one `flwr` command and return its JSON answer; its exit code says nothing."""
    command = ("flwr", *arguments, "--format", "json")
    with (
        contextlib.suppress(subprocess.TimeoutExpired),
        started(link.home, link.environment, "flwr.log", command) as process,
    ):
        process.wait(COMMAND_TIMEOUT_SECONDS)
    text = tail(link.home / "flwr.log", lines=1000)
    found = re.search(r"^\{.*^\}", text, re.MULTILINE | re.DOTALL)  # there may be warnings too
    answer: dict[str, Any] = json.loads(found.group()) if found else {"error-message": text}
    if not answer.get("success"):
        said = str(answer.get("error-message", "")).splitlines()
        why = " ".join(line for line in said if line and not line.startswith("Using SuperLink:"))
        raise EngineError(f"Flower refused `flwr {arguments[0]}`: {why or 'it does not say why'}")
    return answer


def follow(
    link: Link,
    run_id: int,
    on_poll: Callable[[], None],
    poll_seconds: float,
    patience_seconds: float = 0.0,
) -> tuple[str, str]:
    """Wait for the end of a run; return Flower's sub-status and reason.

    A child copies the run's log and ends with the run; `flwr list`, which takes a second of CPU,
    is asked only then. If the stream had merely broken, it is begun again.

    Parameters
    ----------
    patience_seconds : float
        How long a SuperLink that does not answer is asked again.

    Raises
    ------
    EngineError
        If it does not answer, or has ended.
    """
    deadline = None
    command = ("flwr", "log", str(run_id), link.connection)
    while True:
        with started(link.home, link.environment, "run.log", command) as stream:
            while stream.poll() is None:
                require_alive(link)
                on_poll()
                time.sleep(poll_seconds)
        require_alive(link)
        try:
            [run] = ask(link, "list", link.connection, "--run-id", str(run_id))["runs"]
        except EngineError:
            deadline = deadline or time.monotonic() + patience_seconds
            if time.monotonic() >= deadline:
                raise
            time.sleep(poll_seconds)
            continue
        deadline = None
        on_poll()
        status, _, sub_status = run["status"].partition(":")
        if status == "finished":
            return sub_status, run["status-details"].removeprefix("N/A")
